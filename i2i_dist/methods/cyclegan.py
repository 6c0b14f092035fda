"""CycleGAN: Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks (Zhu et al., ICCV 2017).

Two generators and two critics; a picture translated there and back must be the picture (cycle), and a picture that
already belongs to the target domain must stay as it is (identity).

`official` has the losses and optimizers of the authors' PyTorch code; its schedule and crops stand in configs/. `paper`
leaves the identity term out, which the text uses for
paintings only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from i2i_dist.config import Beta, Blocks, NotNegative, Section, Weight, Width
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.critics import CriticPair, DomainPair, judge_real_and_fake
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.resnet import ResNetGenerator


class Hyperparameters(Section):
    """What a configuration's section `method` may say; the defaults are the preset `official`."""

    name: Literal["cyclegan"] = "cyclegan"
    preset: Literal["official", "paper"] = "official"
    width: Width = 64  # channels of the generators' first convolution
    blocks: Blocks = 9
    critic_width: Width = 64
    adversarial: Literal["lsgan", "vanilla", "hinge", "hinge_standard"] = "lsgan"
    lambda_gan: Weight = 1.0
    lambda_cycle_a: Weight = 10.0
    lambda_cycle_b: Weight = 10.0
    lambda_identity: Weight = 0.5  # relative to the cycle terms
    pool_size: NotNegative = 50
    lr: Weight = 2e-4
    betas: tuple[Beta, Beta] = (0.5, 0.999)


class Outputs(NamedTuple):
    """What the generator's side makes of a batch, all [N, 3, H, W]; the fakes alone if no more is asked."""

    fake_a: Tensor
    fake_b: Tensor
    cycled_a: Tensor | None = None
    cycled_b: Tensor | None = None
    identity_a: Tensor | None = None
    identity_b: Tensor | None = None


class Generators(nn.Module):
    """The generator's side: G: A -> B and F: B -> A."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.with_identity = config.lambda_identity > 0
        size: dict[str, Any] = {"width": config.width, "blocks": config.blocks, "antialias": False}
        self.generator_ab, self.generator_ba = ResNetGenerator(**size), ResNetGenerator(**size)
        initialise(self, "normal", generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate both ways, there and back, and what must stay as it is; no draws are needed.

        What one generator can do at once is one pass: the norms are per image, so this changes nothing.
        """
        images = len(batch.a)
        if fakes_only:
            fake_b, _ = self.generator_ab(batch.a)
            fake_a, _ = self.generator_ba(batch.b)
            return Outputs(fake_a, fake_b)
        identity_inputs = (batch.b,) if self.with_identity else ()
        out_b, _ = self.generator_ab(torch.cat([batch.a, *identity_inputs]))
        fake_b, *identity_b = out_b.split(images)
        identity_inputs = (batch.a,) if self.with_identity else ()
        out_a, _ = self.generator_ba(torch.cat([batch.b, fake_b, *identity_inputs]))
        fake_a, cycled_a, *identity_a = out_a.split(images)
        cycled_b, _ = self.generator_ab(fake_a)
        return Outputs(fake_a, fake_b, cycled_a, cycled_b, *identity_a, *identity_b)


class CycleGAN:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {}, "paper": {"lambda_identity": 0.0}}
    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("name", "width", "blocks", "critic_width")
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
        self.couples_batch = False
        self.generator = Generators(config, init)
        size: dict[str, Any] = {"width": config.critic_width, "antialias": False}
        self.discriminator = CriticPair(PatchGAN(**size), PatchGAN(**size))
        initialise(self.discriminator, "normal", generator=init)

    def turns(self, update: int) -> tuple[Side, ...]:
        """Generator first; the critics then see the fakes made before its step."""
        return "generator", "discriminator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """One group a side, with the same rate and betas."""
        lr, betas = self.config.lr, self.config.betas
        return {
            "generator": (ParameterGroup("generators", list(self.generator.parameters()), lr, betas),),
            "discriminator": (ParameterGroup("critics", list(self.discriminator.parameters()), lr, betas),),
        }

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Adversarial, cycle and identity terms of both directions (paper, equation 3 and section 5.2)."""
        config = self.config
        assert outputs.cycled_a is not None and outputs.cycled_b is not None
        logits = judge(DomainPair(outputs.fake_a, outputs.fake_b))
        losses = {
            "gan_ab": config.lambda_gan * generator_loss(config.adversarial, logits.b),
            "gan_ba": config.lambda_gan * generator_loss(config.adversarial, logits.a),
            "cycle_a": config.lambda_cycle_a * l1(outputs.cycled_a, batch.a),
            "cycle_b": config.lambda_cycle_b * l1(outputs.cycled_b, batch.b),
        }
        if outputs.identity_a is not None and outputs.identity_b is not None:
            losses["identity_a"] = config.lambda_cycle_a * config.lambda_identity * l1(outputs.identity_a, batch.a)
            losses["identity_b"] = config.lambda_cycle_b * config.lambda_identity * l1(outputs.identity_b, batch.b)
        return losses

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Half the sum of the real and the fake term, for each critic."""
        fakes = DomainPair(outputs.fake_a, outputs.fake_b)
        real, fake = judge_real_and_fake(judge, DomainPair(batch.a, batch.b), fakes)
        return {
            "critic_a": 0.5 * discriminator_loss(self.config.adversarial, real.a, fake.a),
            "critic_b": 0.5 * discriminator_loss(self.config.adversarial, real.b, fake.b),
        }

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1]."""
        side = self.generator
        translated, _ = (side.generator_ab if direction == "a_to_b" else side.generator_ba)(image)
        assert isinstance(translated, Tensor)
        return translated
