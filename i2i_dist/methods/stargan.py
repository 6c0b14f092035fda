"""StarGAN: Unified GANs for Multi-Domain Image-to-Image Translation (Choi et al., CVPR 2018).

One generator for all labels: it is told what the picture shall show. The critic tells real pictures from made ones
(Wasserstein, with a gradient penalty) and reads the labels; the generator must be read as it was told, and a picture
translated back to its own label must be the picture. The critic trains `critic_turns` times for each turn of the
generator.

`official` is the authors' code, in which the decay of the learning rate that the text speaks of comes to one
thousandth: `lr_constant` is the share that it leaves alone. `paper` has the whole decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from i2i_dist.config import Beta, Blocks, Pixels, Positive, Section, Weight, Width
from i2i_dist.data.batch import LabelledBatch
from i2i_dist.data.labels import LabelSpace
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.losses.labels import classification
from i2i_dist.losses.penalties import gradient_norms, gradient_penalty
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.conditional_resnet import ConditionalGenerator
from i2i_dist.networks.init import initialise
from i2i_dist.networks.labelled_critic import LabelledCritic, Matching, Reading


class LabelKeys(Section):
    """The keys that StarGAN and MatchGAN share; the defaults are the preset `official`, for CelebA."""

    name: str
    preset: Literal["official", "paper"] = "official"
    attributes: tuple[str, ...] = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young")
    at_most_one: tuple[tuple[str, ...], ...] = (("Black_Hair", "Blond_Hair", "Brown_Hair"),)
    exactly_one: tuple[tuple[str, ...], ...] = ()
    labelled_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the pictures with valid labels: whose are told
    image_size: Pixels = 128  # what data.crop_size must be; a multiple of 2 ** critic_layers
    width: Width = 64  # channels of the generator's first convolution
    blocks: Blocks = 6
    critic_width: Width = 64
    critic_layers: Annotated[int, Field(ge=1, le=14)] = 6  # halvings
    critic_turns: Positive = 5  # of the critic, for one of the generator
    lambda_gan: Weight = 1.0
    lambda_gp: Weight = 10.0  # gradient penalty
    lambda_cls: Weight = 1.0
    lambda_rec: Weight = 10.0
    lr: Weight = 1e-4
    lr_constant: Annotated[float, Field(ge=0, le=1)] = 0.999  # share of the rate that the schedule leaves alone
    betas: tuple[Beta, Beta] = (0.5, 0.999)

    def space(self) -> LabelSpace:
        """List the labels that are valid."""
        return LabelSpace(self.attributes, self.at_most_one, self.exactly_one)

    @model_validator(mode="after")
    def _fits(self) -> LabelKeys:
        if self.image_size % 2**self.critic_layers:
            raise ValueError(
                f"image_size: given {self.image_size}, allowed with critic_layers={self.critic_layers} is a multiple "
                f"of {2**self.critic_layers}"
            )
        self.space()  # raises where the keys above do not make one
        return self


class Hyperparameters(LabelKeys):
    """What a configuration's section `method` may say."""

    name: Literal["stargan"] = "stargan"
    targets: Literal["data", "space"] = "data"  # labels of pictures, as often as they occur; or all valid ones alike


class Outputs(NamedTuple):
    """What the generator's side makes of a batch; the first two alone if no more is asked.

    Attributes:
        fake: Translations [N, 3, S, S].
        mixed: Pictures and their translations, mixed in a share of each sample's own, without gradient.
        target: [N, L], what the translations shall show.
        reconstructed: The translations, translated back; None of pictures whose labels are not told.
    """

    fake: Tensor
    mixed: Tensor
    target: Tensor | None = None
    reconstructed: Tensor | None = None


class Generators(nn.Module):
    """The generator's side: one generator; `draw_targets` gives the labels [N, L] that the pictures are to have."""

    def __init__(
        self, config: LabelKeys, draw_targets: Callable[[LabelledBatch, Draws], Tensor], init: torch.Generator
    ) -> None:
        super().__init__()
        self._draw_targets = draw_targets
        size = {"width": config.width, "blocks": config.blocks}
        self.generator = ConditionalGenerator(attributes=len(config.attributes), **size)
        initialise(self, "uniform", generator=init)

    def forward(self, batch: LabelledBatch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate and mix; and translate back the pictures whose labels are told."""
        target = self._draw_targets(batch, draws).to(batch.images.device, non_blocking=True)
        fake = self.generator(batch.images, target)
        share = draws.uniform("mixed", batch.positions).to(batch.images.device, batch.images.dtype, non_blocking=True)
        mixed = torch.lerp(fake.detach().to(batch.images.dtype), batch.images, share[:, None, None, None])
        if fakes_only:
            return Outputs(fake, mixed)
        reconstructed = None if batch.labels is None else self.generator(fake, batch.labels)
        return Outputs(fake, mixed, target, reconstructed)


class CriticInput(NamedTuple):
    """What the critic is asked: to read `images`, with `pairs` of them; and how steep it is at each of `mixed`."""

    images: Tensor
    pairs: Tensor | None = None
    mixed: Tensor | None = None


class Verdict(NamedTuple):
    """What the critic answers: its reading of the images, and its steepness [N] where that was asked for."""

    reading: Reading
    norms: Tensor | None


class Critic(nn.Module):
    """The discriminator's side. It differentiates itself for the penalty, so that it must be whole."""

    def __init__(self, config: LabelKeys, init: torch.Generator, matching: Matching | None = None) -> None:
        super().__init__()
        size = {"image_size": config.image_size, "width": config.critic_width, "layers": config.critic_layers}
        self.critic = LabelledCritic(attributes=len(config.attributes), **size, matching=matching)
        initialise(self, "uniform", generator=init)

    def forward(self, asked: CriticInput) -> Verdict:
        """Read the images in one pass, which without norms equals many; and find the norms."""
        norms = None
        if asked.mixed is not None:
            norms = gradient_norms(lambda images: self.critic(images).patches, asked.mixed)
        return Verdict(self.critic(asked.images, asked.pairs), norms)


def generator_terms(config: LabelKeys, space: LabelSpace, batch: LabelledBatch, out: Outputs, read: Reading) -> Losses:
    """Adversarial term, labels as they were asked for, and cycle (paper, equations 3, 4 and 6)."""
    assert out.target is not None
    classes = classification(read.classes, out.target, space.choices, space.free)
    losses = {
        "gan_fake": config.lambda_gan * generator_loss("wgan", read.patches),
        "class_fake": config.lambda_cls * classes,
    }
    if out.reconstructed is not None:
        losses["cycle"] = config.lambda_rec * l1(out.reconstructed, batch.images)
    return losses


def critic_terms(config: LabelKeys, space: LabelSpace, batch: LabelledBatch, verdict: Verdict) -> Losses:
    """Adversarial term, penalty, and labels as they are (paper, equations 2, 5 and 8)."""
    assert verdict.norms is not None
    images = len(batch.images)
    losses = {
        "critic": config.lambda_gan * discriminator_loss("wgan", *verdict.reading.patches.split(images)),
        "penalty": config.lambda_gp * gradient_penalty(verdict.norms),
    }
    if batch.labels is not None:
        classes = classification(verdict.reading.classes[:images], batch.labels, space.choices, space.free)
        losses["class_real"] = config.lambda_cls * classes
    return losses


def turns_of(config: LabelKeys, update: int) -> tuple[Side, ...]:
    """Return the critic's turn, which the generator's follows every `critic_turns`-th time."""
    both = update % config.critic_turns == config.critic_turns - 1
    return ("discriminator", "generator") if both else ("discriminator",)


def groups_of(config: LabelKeys, sides: Mapping[Side, nn.Module]) -> dict[Side, Sequence[ParameterGroup]]:
    """Return one group a network, all with the same rate and betas."""
    rest: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "constant": config.lr_constant}
    return {
        side: [ParameterGroup(name, list(net.parameters()), **rest) for name, net in module.named_children()]
        for side, module in sides.items()
    }


class StarGAN:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {}, "paper": {"lr_constant": 0.0}}
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (
        "name", "attributes", "at_most_one", "exactly_one", "image_size", "width", "blocks", "critic_width",
        "critic_layers",
    )  # fmt: skip
    streams: ClassVar[tuple[Stream, ...]] = ("labelled",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    fakes: ClassVar[tuple[str, ...]] = ("fake",)
    shown: ClassVar[tuple[str, ...]] = ("mixed",)
    penalised: ClassVar[bool] = True
    multiple: ClassVar[int] = 4
    group: ClassVar[int] = 1
    labelled_group: ClassVar[tuple[int, int] | None] = None

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size, self.couples_batch = 0, False
        self.label_space, self.labelled_fraction = config.space(), config.labelled_fraction
        self._classes = torch.from_numpy(self.label_space.classes).float()
        self.generator, self.discriminator = Generators(config, self._targets, init), Critic(config, init)

    def _targets(self, batch: LabelledBatch, draws: Draws) -> Tensor:
        if self.config.targets == "data":
            assert batch.others is not None
            return batch.others
        return self._classes[draws.distinct("target", batch.positions, len(self._classes), 1)[:, 0]]

    def turns(self, update: int) -> tuple[Side, ...]:
        """The critic; and at every `critic_turns`-th update the generator after it, on the same batch."""
        return turns_of(self.config, update)

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """One group a network, with the same rate and betas."""
        return groups_of(self.config, {"generator": self.generator, "discriminator": self.discriminator})

    def generator_loss(self, batch: LabelledBatch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Adversarial term, labels as they were asked for, and cycle."""
        verdict = judge(CriticInput(outputs.fake))
        return generator_terms(self.config, self.label_space, batch, outputs, verdict.reading)

    def discriminator_loss(self, batch: LabelledBatch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Adversarial term, gradient penalty, and labels as they are."""
        verdict = judge(CriticInput(torch.cat([batch.images, outputs.fake]), mixed=outputs.mixed))
        return critic_terms(self.config, self.label_space, batch, verdict)

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1] into the first class of the space."""
        return self.translate_labelled(image, self._classes[:1].to(image.device).expand(len(image), -1))

    def translate_labelled(self, image: Tensor, labels: Tensor) -> Tensor:
        """Translate images [N, 3, H, W], each into its own row of `labels` [N, L] of 0 and 1."""
        translated: Tensor = self.generator.generator(image, labels)
        return translated
