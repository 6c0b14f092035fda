"""CUT and FastCUT: Contrastive Learning for Unpaired Image-to-Image Translation (Park et al., ECCV 2020).

One generator from A to B, one critic, and a projection head over the generator's own encoder. A patch of the
translation must resemble, among all patches of the picture it was made from, the one at its own place (PatchNCE); a
picture of B must pass through unchanged by the same measure.

`official` has the released code's losses and optimizers; its schedule and crops stand in configs/. `paper` has both
PatchNCE terms at full weight, of which the code takes the mean. `fastcut` is the light version: the identity term goes,
the other weighs ten times as much, and half of the updates translate mirrored pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from i2i_dist.config import Beta, Blocks, Positive, Section, Weight, Width
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.patch_nce import patch_nce
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.projection import ProjectionHead, project
from i2i_dist.networks.resnet import ResNetGenerator, check_taps


class Hyperparameters(Section):
    """What a configuration's section `method` may say; the defaults are the preset `official`."""

    name: Literal["cut"] = "cut"
    preset: Literal["official", "paper", "fastcut"] = "official"
    width: Width = 64  # channels of the generator's first convolution
    blocks: Blocks = 9
    critic_width: Width = 64
    head_dim: Width = 256
    nce_layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("rgb", "down1", "down2", "block1", "block5")
    nce_patches: Positive = 256
    nce_identity: bool = True  # PatchNCE between pictures of B and what the generator makes of them, too
    temperature: Annotated[float, Field(ge=0.01, le=1)] = 0.07
    negatives: Literal["image", "global_batch"] = "image"  # which patches a patch is told apart from
    flip_equivariance: bool = False  # mirror the generator's input with probability 1/2, all of an update alike
    adversarial: Literal["lsgan", "vanilla", "hinge", "hinge_standard"] = "lsgan"
    lambda_gan: Weight = 1.0
    lambda_nce: Weight = 1.0
    halved: bool = True  # where there are two PatchNCE terms, the released code multiplies each by 1/2
    lr: Weight = 2e-4
    betas: tuple[Beta, Beta] = (0.5, 0.999)

    @model_validator(mode="after")
    def _layers_exist(self) -> Hyperparameters:
        try:
            check_taps(self.nce_layers, self.blocks)
        except ValueError as error:
            raise ValueError(f"nce_layers: {error}") from None
        return self


class Outputs(NamedTuple):
    """What the generator's side makes of a batch; the fakes alone if no more is asked.

    Features are one tensor [N, P, D] for each tapped layer: keys those of real pictures, queries those of what the
    generator made of them.
    """

    fake_b: Tensor  # mirrored where the update's pictures were
    keys_a: tuple[Tensor, ...] = ()
    queries_fake_b: tuple[Tensor, ...] = ()
    keys_b: tuple[Tensor, ...] = ()
    queries_identity_b: tuple[Tensor, ...] = ()


class Generator(nn.Module):
    """The generator's side: G: A -> B, and the head over its encoder."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.layers, self.patches = config.nce_layers, config.nce_patches
        self.with_identity, self.flip_equivariance = config.nce_identity, config.flip_equivariance
        self.generator_ab = ResNetGenerator(width=config.width, blocks=config.blocks, antialias=True)
        self.head = ProjectionHead(self.generator_ab.tap_channels(self.layers), config.head_dim)
        initialise(self, "xavier", generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate A to B; also the features of the patches drawn, of B and its translation too with the identity.

        Both domains go through in one pass, and the keys are tapped from it: the norms are per image, so both are
        exact. With a flip the pass sees other pictures than the keys are taken from, and these are encoded apart.
        """
        flipped = self.flip_equivariance and draws.coin("flip")
        if fakes_only:
            return Outputs(self.generator_ab(batch.a.flip(-1) if flipped else batch.a)[0])
        real = torch.cat([batch.a, batch.b]) if self.with_identity else batch.a
        if flipped:
            made, _ = self.generator_ab(real.flip(-1))
            with torch.no_grad():
                _, taps = self.generator_ab(real, self.layers, encode_only=True)
        else:
            made, taps = self.generator_ab(real, self.layers)
        _, taps_made = self.generator_ab(made, self.layers, encode_only=True)

        def features(purpose: str, images: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            ids = draw_patches(draws, purpose, self.layers, taps, self.patches)
            with torch.no_grad():  # the loss takes no gradient through its keys
                keys = project(self.head, [tap[images] for tap in taps], ids)
            if flipped:
                ids = [mirrored(places, tap.size(-1)) for places, tap in zip(ids, taps, strict=True)]
            return keys, project(self.head, [tap[images] for tap in taps_made], ids)

        count = len(batch.a)
        of_a = features("ab", slice(count))
        of_b = features("identity", slice(count, None)) if self.with_identity else ()
        return Outputs(made[:count], *of_a, *of_b)


def draw_patches(draws: Draws, purpose: str, layers: Sequence[str], taps: Sequence[Tensor], count: int) -> list[Tensor]:
    """Draw up to `count` patches of each layer: one set of positions [P] each, shared by all images of the update.

    Args:
        draws: The update's draws.
        purpose: Two purposes never share positions.
        layers: The names of the layers.
        taps: Their feature maps [N, C, h, w].
        count: How many; a layer with fewer locations has all of them drawn.
    """
    return [
        draws.patch_ids(f"{purpose}.{layer}", tap[0, 0].numel(), count).to(tap.device, non_blocking=True)
        for layer, tap in zip(layers, taps, strict=True)
    ]


def mirrored(ids: Tensor, width: int) -> Tensor:
    """Return where locations `row * width + column` lie in the mirrored map: sampling there flips the map back."""
    return ids + (width - 1) - 2 * (ids % width)


class Critic(nn.Module):
    """The discriminator's side: images of domain B [N, 3, H, W] to logits [N, 1, h, w]."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.critic_b = PatchGAN(width=config.critic_width)
        initialise(self, "xavier", generator=init)

    def forward(self, images: Tensor) -> Tensor:
        """Judge images."""
        logits: Tensor = self.critic_b(images)
        return logits


class CUT:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {},
        "paper": {"halved": False},
        "fastcut": {"lambda_nce": 10.0, "nce_identity": False, "flip_equivariance": True},
    }
    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("name", "width", "blocks", "critic_width", "head_dim", "nce_layers")
    streams: ClassVar[tuple[Stream, ...]] = ("unpaired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    multiple: ClassVar[int] = 4
    group: ClassVar[int] = 1
    fakes: ClassVar[tuple[str, ...]] = ("fake_b",)
    shown: ClassVar[tuple[str, ...]] = ()
    penalised: ClassVar[bool] = False

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size = 0
        self.couples_batch = config.negatives == "global_batch"
        self.generator = Generator(config, init)
        self.discriminator = Critic(config, init)

    def turns(self, update: int) -> tuple[Side, ...]:
        """Discriminator first; both turns share the batch."""
        return "discriminator", "generator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """Generator, head and critic share rate and betas."""
        lr, betas = self.config.lr, self.config.betas
        return {
            "generator": (ParameterGroup("generator", list(self.generator.parameters()), lr, betas),),
            "discriminator": (ParameterGroup("critic", list(self.discriminator.parameters()), lr, betas),),
        }

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """The adversarial term and one or two PatchNCE terms (the paper's final objective)."""
        config = self.config
        weight = config.lambda_nce * (0.5 if config.halved and config.nce_identity else 1.0)

        def nce(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
            return patch_nce(queries, keys, temperature=config.temperature, negatives=config.negatives, eps=1e-7)

        losses = {
            "gan_ab": config.lambda_gan * generator_loss(config.adversarial, judge(outputs.fake_b)),
            "nce_ab": weight * nce(outputs.queries_fake_b, outputs.keys_a),
        }
        if config.nce_identity:
            losses["nce_identity"] = weight * nce(outputs.queries_identity_b, outputs.keys_b)
        return losses

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Half the sum of the real and the fake term."""
        # In one pass: the critic's norms are per image.
        real, fake = judge(torch.cat([batch.b, outputs.fake_b])).split(len(batch.b))
        return {"critic_b": 0.5 * discriminator_loss(self.config.adversarial, real, fake)}

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1] from A to B."""
        translated: Tensor = self.generator.generator_ab(image)[0]
        return translated
