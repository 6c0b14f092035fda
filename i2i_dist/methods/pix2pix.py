"""pix2pix: Image-to-Image Translation with Conditional Adversarial Networks (Isola et al., CVPR 2017).

One generator, a U-Net from A to B, and one critic that judges a picture together with the A it belongs to. The pictures
come in pairs, and the translation must also be near the true B (L1).

`official`, the only preset, has the losses and optimizers of the authors' PyTorch code; its schedule and crops stand in
configs/. The text is not known to differ in anything that could be set here.

Batch norm runs over the global batch. The authors' code tests as it trains: each picture is normalised by its own
statistics, and dropout stays on. So does `translate`, with the same dropout for every picture, so that a picture comes
out the same each time and whatever it is batched with. Above batch 1 `translation_statistics: running` may suit better:
those are the statistics that this code takes when told to evaluate, though it then drops nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from i2i_dist.config import Beta, Section, Weight, Width
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.batch_norm import Statistics
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.unet import UNetGenerator


class Hyperparameters(Section):
    """What a configuration's section `method` may say; the defaults are the preset `official`."""

    name: Literal["pix2pix"] = "pix2pix"
    preset: Literal["official"] = "official"
    width: Width = 64  # channels of the generator's first convolution
    downs: Annotated[int, Field(ge=2, le=14)] = 8  # halvings; crop_size must be a multiple of 2 ** downs
    critic_width: Width = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of the values that it drops
    adversarial: Literal["vanilla", "lsgan", "hinge", "hinge_standard"] = "vanilla"
    lambda_l1: Weight = 100.0
    translation_statistics: Literal["image", "running"] = "image"  # what batch norm normalises by in translations
    lr: Weight = 2e-4
    betas: tuple[Beta, Beta] = (0.5, 0.999)


class Outputs(NamedTuple):
    """What the generator's side makes of a batch: [N, 3, H, W]."""

    fake_b: Tensor


class CriticInput(NamedTuple):
    """What the critic is shown, all [N, 3, H, W]: translations of `source`, and in its own turn the true pictures."""

    source: Tensor
    fake: Tensor
    real: Tensor | None = None


class Logits(NamedTuple):
    """What the critic says, [N, 1, h, w] each."""

    fake: Tensor
    real: Tensor | None = None


class Generator(nn.Module):
    """The generator's side: G: A -> B."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.rate = config.dropout
        self.generator_ab = UNetGenerator(width=config.width, downs=config.downs, dropout=config.dropout)
        initialise(self, "normal", generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate; there is nothing else to make, whether or not more than the fakes is asked for."""
        return Outputs(self.generator_ab(batch.a, self._kept(batch.a, draws, batch.positions)))

    def translate(self, image: Tensor, statistics: Statistics) -> Tensor:
        """Translate images [N, 3, H, W], each as if it were alone."""
        kept = self._kept(image, Draws(0, 0), torch.zeros(1, dtype=torch.int64))
        translated: Tensor = self.generator_ab(image, kept, statistics)
        return translated

    def _kept(self, image: Tensor, draws: Draws, positions: Tensor) -> list[Tensor]:
        shapes = self.generator_ab.dropout_shapes(*image.shape[-2:])
        return [
            draws.kept(f"up{place}", positions, shape, self.rate).to(image.device, non_blocking=True)
            for place, shape in enumerate(shapes)
        ]


class ConditionalCritic(nn.Module):
    """The discriminator's side: one critic, which reads A and a picture of B as six channels."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.critic_b = PatchGAN(in_channels=6, width=config.critic_width, antialias=False, norm="batch")
        initialise(self, "normal", generator=init)

    def forward(self, shown: CriticInput) -> Logits:
        """Judge translations and true pictures in passes of their own: batch norm must not see both at once."""
        fake = self.critic_b(torch.cat([shown.source, shown.fake], dim=1))
        if shown.real is None:
            return Logits(fake)
        return Logits(fake, self.critic_b(torch.cat([shown.source, shown.real], dim=1)))


class Pix2Pix:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {}}
    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("name", "width", "downs", "critic_width")
    streams: ClassVar[tuple[Stream, ...]] = ("paired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    fakes: ClassVar[tuple[str, ...]] = ("fake_b",)
    shown: ClassVar[tuple[str, ...]] = ()
    penalised: ClassVar[bool] = False
    group: ClassVar[int] = 1

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size = 0
        self.couples_batch = True  # by batch norm, so the global batch must be one pass
        self.generator = Generator(config, init)
        self.discriminator = ConditionalCritic(config, init)
        self.multiple = self.generator.generator_ab.multiple

    def turns(self, update: int) -> tuple[Side, ...]:
        """Discriminator first; both turns share the batch."""
        return "discriminator", "generator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """One group a side, with the same rate and betas."""
        lr, betas = self.config.lr, self.config.betas
        return {
            "generator": (ParameterGroup("generator", list(self.generator.parameters()), lr, betas),),
            "discriminator": (ParameterGroup("critic", list(self.discriminator.parameters()), lr, betas),),
        }

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Adversarial term and distance to the true picture (paper, equation 4)."""
        logits = judge(CriticInput(batch.a, outputs.fake_b))
        return {
            "gan_ab": generator_loss(self.config.adversarial, logits.fake),
            "l1_b": self.config.lambda_l1 * l1(outputs.fake_b, batch.b),
        }

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Half the sum of the real and the fake term."""
        logits = judge(CriticInput(batch.a, outputs.fake_b, batch.b))
        return {"critic_b": 0.5 * discriminator_loss(self.config.adversarial, logits.real, logits.fake)}

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1] from A to B."""
        return self.generator.translate(image, self.config.translation_statistics)
