"""DCLGAN: Dual Contrastive Learning for Unsupervised Image-to-Image Translation (Han et al., CVPRW 2021).

Two generators, two critics, and one projection head for each domain. A patch of the translation must resemble, among
all patches of the picture it was made from, the one at its own place (PatchNCE), with the two domains embedded by two
different encoders: those of the generators that read them.

`official` has the released code's losses and optimizers; its schedule and crops stand in configs/. `paper` follows the
text in the learning rate of 1e-4, a pool of 50 images, and losses without the common factor 1/2; the text's strided
convolutions and 70 x 70 critic are not here. The rate of the heads, 1e-3 with Adam's default betas, stands in the code
alone; the paper does not mention it, so `paper` gives the heads the rate of the generators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from i2i_dist.config import Beta, Blocks, NotNegative, Positive, Section, Weight, Width
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.losses.patch_nce import patch_nce
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.methods.cut import draw_patches
from i2i_dist.networks.critics import CriticPair, DomainPair, judge_real_and_fake
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.projection import ProjectionHead, project
from i2i_dist.networks.resnet import ResNetGenerator, check_taps


class Hyperparameters(Section):
    """What a configuration's section `method` may say; the defaults are the preset `official`."""

    name: Literal["dclgan"] = "dclgan"
    preset: Literal["official", "paper"] = "official"
    width: Width = 64  # channels of the generators' first convolution
    blocks: Blocks = 9
    critic_width: Width = 64
    head_dim: Width = 256
    nce_layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("down1", "down2", "block1", "block5")
    nce_patches: Positive = 256
    temperature: Annotated[float, Field(ge=0.01, le=1)] = 0.07
    negatives: Literal["image", "global_batch"] = "image"  # which patches a patch is told apart from
    adversarial: Literal["hinge", "hinge_standard", "lsgan", "vanilla"] = "hinge"
    lambda_gan: Weight = 1.0
    lambda_nce: Weight = 2.0
    lambda_identity: Weight = 1.0
    halved: bool = True  # the released code multiplies every generator term by 1/2
    pool_size: NotNegative = 0
    lr: Weight = 2e-4
    lr_heads: Weight = 1e-3
    betas: tuple[Beta, Beta] = (0.5, 0.999)
    betas_heads: tuple[Beta, Beta] = (0.9, 0.999)

    @model_validator(mode="after")
    def _layers_exist(self) -> Hyperparameters:
        try:
            check_taps(self.nce_layers, self.blocks)
        except ValueError as error:
            raise ValueError(f"nce_layers: {error}") from None
        return self


class Outputs(NamedTuple):
    """What the generator's side makes of a batch; the fakes alone if no more is asked.

    Features are one tensor [N, P, D] for each tapped layer: `keys_a` those of real A, `queries_a` those of fake A.
    """

    fake_a: Tensor
    fake_b: Tensor
    identity_a: Tensor | None = None
    identity_b: Tensor | None = None
    keys_a: tuple[Tensor, ...] = ()
    keys_b: tuple[Tensor, ...] = ()
    queries_a: tuple[Tensor, ...] = ()
    queries_b: tuple[Tensor, ...] = ()


class Passes(NamedTuple):
    """Both generators' passes over a batch: images, and the feature maps [N, C, h, w] of each tapped layer.

    Domain A is encoded by the generator A -> B, domain B by the generator B -> A.
    """

    fake_a: Tensor
    fake_b: Tensor
    identity_a: Tensor
    identity_b: Tensor
    taps_a: tuple[Tensor, ...]
    taps_b: tuple[Tensor, ...]
    taps_fake_a: tuple[Tensor, ...]
    taps_fake_b: tuple[Tensor, ...]


class DualGenerators(nn.Module):
    """G: A -> B, F: B -> A, the heads H_A, H_B over their encoders, and the passes that DCLGAN and SimDCL share."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.layers, self.patches = config.nce_layers, config.nce_patches
        size: dict[str, Any] = {"width": config.width, "blocks": config.blocks, "antialias": True}
        self.generator_ab, self.generator_ba = ResNetGenerator(**size), ResNetGenerator(**size)
        channels = self.generator_ab.tap_channels(self.layers)
        self.head_a, self.head_b = ProjectionHead(channels, config.head_dim), ProjectionHead(channels, config.head_dim)
        initialise(self, "xavier", generator=init)

    def passes(self, batch: Batch) -> Passes:
        """Translate both ways, make the identity passes, and encode sources and translations.

        Each generator sees source and identity input in one pass, and the source is tapped there instead of encoded
        again: the norms are per image, so both are exact.
        """
        images = len(batch.a)
        out_b, taps_a = self.generator_ab(torch.cat([batch.a, batch.b]), self.layers)
        out_a, taps_b = self.generator_ba(torch.cat([batch.b, batch.a]), self.layers)
        (fake_b, identity_b), (fake_a, identity_a) = out_b.split(images), out_a.split(images)
        _, taps_fake_b = self.generator_ba(fake_b, self.layers, encode_only=True)
        _, taps_fake_a = self.generator_ab(fake_a, self.layers, encode_only=True)
        taps_a, taps_b = (tuple(tap[:images] for tap in taps) for taps in (taps_a, taps_b))
        return Passes(fake_a, fake_b, identity_a, identity_b, taps_a, taps_b, taps_fake_a, taps_fake_b)

    def contrast(self, passes: Passes, draws: Draws, *, key_gradient: bool) -> Outputs:
        """Project the patches drawn: translations are queried where the keys of their sources lie.

        PatchNCE takes no gradient through its keys; `key_gradient` is for a method with another use of them.
        """
        ids_ab, ids_ba = self.draw_ids("ab", passes.taps_a, draws), self.draw_ids("ba", passes.taps_b, draws)
        with torch.set_grad_enabled(key_gradient and torch.is_grad_enabled()):
            keys_a = project(self.head_a, passes.taps_a, ids_ab)
            keys_b = project(self.head_b, passes.taps_b, ids_ba)
        queries_b = project(self.head_b, passes.taps_fake_b, ids_ab)
        queries_a = project(self.head_a, passes.taps_fake_a, ids_ba)
        return Outputs(*passes[:4], keys_a, keys_b, queries_a, queries_b)

    def draw_ids(self, purpose: str, taps: Sequence[Tensor], draws: Draws) -> list[Tensor]:
        """Draw patches for one purpose: one set of positions per layer, shared by all images of the update."""
        return draw_patches(draws, purpose, self.layers, taps, self.patches)

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1]."""
        translated: Tensor = (self.generator_ab if direction == "a_to_b" else self.generator_ba)(image)[0]
        return translated


class Generators(DualGenerators):
    """The generator's side."""

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate both ways; also the identity passes and the features of the patches drawn."""
        if fakes_only:
            return Outputs(self.generator_ba(batch.b)[0], self.generator_ab(batch.a)[0])
        return self.contrast(self.passes(batch), draws, key_gradient=False)


def dual_losses(config: Hyperparameters, batch: Batch, outputs: Outputs, judge: Judge) -> Losses:
    """Return the adversarial, PatchNCE and identity terms of both directions (paper, equation 8)."""
    assert outputs.identity_a is not None and outputs.identity_b is not None
    half = 0.5 if config.halved else 1.0
    logits = judge(DomainPair(outputs.fake_a, outputs.fake_b))

    def nce(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        # The released code takes the cosine of rows it has already normalised, which leaves no eps.
        return patch_nce(queries, keys, temperature=config.temperature, negatives=config.negatives, eps=0.0)

    return {
        "gan_ab": half * config.lambda_gan * generator_loss(config.adversarial, logits.b),
        "gan_ba": half * config.lambda_gan * generator_loss(config.adversarial, logits.a),
        "nce_ab": half * config.lambda_nce * nce(outputs.queries_b, outputs.keys_a),
        "nce_ba": half * config.lambda_nce * nce(outputs.queries_a, outputs.keys_b),
        "identity_a": half * config.lambda_identity * l1(outputs.identity_a, batch.a),
        "identity_b": half * config.lambda_identity * l1(outputs.identity_b, batch.b),
    }


def critic_losses(config: Hyperparameters, batch: Batch, fakes: DomainPair, judge: Judge) -> Losses:
    """Return half the sum of the real and the fake term, for each critic."""
    real, fake = judge_real_and_fake(judge, DomainPair(batch.a, batch.b), fakes)
    return {
        "critic_a": 0.5 * discriminator_loss(config.adversarial, real.a, fake.a),
        "critic_b": 0.5 * discriminator_loss(config.adversarial, real.b, fake.b),
    }


class DCLGAN:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {},
        "paper": {"lr": 1e-4, "lr_heads": 1e-4, "betas_heads": [0.5, 0.999], "pool_size": 50, "halved": False},
    }
    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("name", "width", "blocks", "critic_width", "head_dim", "nce_layers")
    streams: ClassVar[tuple[Stream, ...]] = ("unpaired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b", "b_to_a")
    fakes: ClassVar[tuple[str, ...]] = ("fake_a", "fake_b")
    shown: ClassVar[tuple[str, ...]] = ()
    penalised: ClassVar[bool] = False
    multiple: ClassVar[int] = 4
    group: ClassVar[int] = 1

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size = config.pool_size
        self.couples_batch = config.negatives == "global_batch"
        self.generator = Generators(config, init)
        critic_a, critic_b = PatchGAN(width=config.critic_width), PatchGAN(width=config.critic_width)
        self.discriminator = CriticPair(critic_a, critic_b)
        initialise(self.discriminator, "xavier", generator=init)

    def turns(self, update: int) -> tuple[Side, ...]:
        """Discriminator first; both turns share the batch."""
        return "discriminator", "generator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """Generators and critics share rate and betas; the heads have their own."""
        config, side = self.config, self.generator
        generators = [*side.generator_ab.parameters(), *side.generator_ba.parameters()]
        heads = [*side.head_a.parameters(), *side.head_b.parameters()]
        return {
            "generator": (
                ParameterGroup("generators", generators, config.lr, config.betas),
                ParameterGroup("heads", heads, config.lr_heads, config.betas_heads),
            ),
            "discriminator": (
                ParameterGroup("critics", list(self.discriminator.parameters()), config.lr, config.betas),
            ),
        }

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Adversarial, PatchNCE and identity terms of both directions (paper, equation 8)."""
        return dual_losses(self.config, batch, outputs, judge)

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Half the sum of the real and the fake term, for each critic."""
        return critic_losses(self.config, batch, DomainPair(outputs.fake_a, outputs.fake_b), judge)

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1]."""
        return self.generator.translate(image, direction)
