"""SimDCL: DCLGAN with a similarity loss (Han et al., Dual Contrastive Learning, CVPRW 2021).

Everything of DCLGAN, and four small networks that map the projected features of a whole picture to one vector: the
vectors of real and of translated pictures of one domain must be close, which works against mode collapse.

`official` has the released code's losses and optimizers; its schedule and crops stand in configs/. That code reads the
weight 2 of PatchNCE and does not apply it, which makes it 1, and takes the distance between two vectors as a mean over
their 64 components. `paper` follows the text: weight 2, the sum over the components, no common factor 1/2, and a pool
of 50 images. The text's strided convolutions and 70 x 70 critic are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from i2i_dist.config import Beta, Weight
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.cycle import l1
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.methods import dclgan
from i2i_dist.networks.critics import CriticPair, DomainPair
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.projection import project
from i2i_dist.networks.siamese import MappingNet


class Hyperparameters(dclgan.Hyperparameters):
    """What a configuration's section `method` may say: DCLGAN's keys, and the similarity's."""

    name: Literal["simdcl"] = "simdcl"  # type: ignore[assignment]
    preset: Literal["official", "paper"] = "official"
    head_dim: Annotated[int, Field(ge=3, le=65_536)] = 256  # the mapping networks' convolution needs three
    nce_patches: Annotated[int, Field(ge=3, le=10**12)] = 256
    lambda_nce: Weight = 1.0
    lambda_similarity: Weight = 10.0
    similarity_reduction: Literal["mean", "sum"] = "mean"  # over the components of a vector
    lr_heads: Weight = 2e-4  # of the mapping networks too
    betas_heads: tuple[Beta, Beta] = (0.5, 0.999)


class Outputs(NamedTuple):
    """What the generator's side makes of a batch; the fakes alone if no more is asked.

    Attributes:
        fake_a: Translations [N, 3, H, W].
        fake_b: Translations [N, 3, H, W].
        dual: What DCLGAN's losses need.
        vectors_a: One vector [N, 64] for each real picture of A, and one for each translation to A.
        vectors_b: The same for B.
    """

    fake_a: Tensor
    fake_b: Tensor
    dual: dclgan.Outputs | None = None
    vectors_a: tuple[Tensor, ...] = ()
    vectors_b: tuple[Tensor, ...] = ()


class Generators(dclgan.DualGenerators):
    """The generator's side: DCLGAN's, and the mapping networks (F3 real A, F4 fake B, F5 real B, F6 fake A)."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__(config, init)
        layers = len(config.nce_layers)
        self.mapping_real_a, self.mapping_fake_b = MappingNet(layers), MappingNet(layers)
        self.mapping_real_b, self.mapping_fake_a = MappingNet(layers), MappingNet(layers)
        for mapping in (self.mapping_real_a, self.mapping_fake_b, self.mapping_real_b, self.mapping_fake_a):
            initialise(mapping, "xavier", generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate both ways; also the identity passes, the features of the patches drawn, and all vectors.

        Real pictures are mapped from their keys, here with gradient; translations from patches drawn for this alone.
        """
        if fakes_only:
            return Outputs(self.generator_ba(batch.b)[0], self.generator_ab(batch.a)[0])
        passes = self.passes(batch)
        dual = self.contrast(passes, draws, key_gradient=True)
        fake_a = project(self.head_a, passes.taps_fake_a, self.draw_ids("similarity_a", passes.taps_fake_a, draws))
        fake_b = project(self.head_b, passes.taps_fake_b, self.draw_ids("similarity_b", passes.taps_fake_b, draws))
        vectors_a = self.mapping_real_a(dual.keys_a), self.mapping_fake_a(fake_a)
        vectors_b = self.mapping_real_b(dual.keys_b), self.mapping_fake_b(fake_b)
        return Outputs(dual.fake_a, dual.fake_b, dual, vectors_a, vectors_b)


class SimDCL:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {},
        "paper": {"lambda_nce": 2.0, "similarity_reduction": "sum", "halved": False, "pool_size": 50},
    }
    ARCHITECTURE: ClassVar[tuple[str, ...]] = dclgan.DCLGAN.ARCHITECTURE
    streams: ClassVar[tuple[Stream, ...]] = ("unpaired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b", "b_to_a")
    multiple: ClassVar[int] = 4
    group: ClassVar[int] = 1
    fakes: ClassVar[tuple[str, ...]] = ("fake_a", "fake_b")
    shown: ClassVar[tuple[str, ...]] = ()
    penalised: ClassVar[bool] = False

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
        """Generators and critics share rate and betas; heads and mapping networks have their own."""
        config, side = self.config, self.generator
        generators = [*side.generator_ab.parameters(), *side.generator_ba.parameters()]
        mappings = (side.mapping_real_a, side.mapping_fake_b, side.mapping_real_b, side.mapping_fake_a)
        heads = [p for module in (side.head_a, side.head_b, *mappings) for p in module.parameters()]
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
        """DCLGAN's terms, and the similarity of each domain (paper, equation 6) as a mean over the images."""
        config = self.config
        assert outputs.dual is not None
        losses = dclgan.dual_losses(config, batch, outputs.dual, judge)
        for domain, (real, fake) in (("a", outputs.vectors_a), ("b", outputs.vectors_b)):
            components = real.size(1) if config.similarity_reduction == "sum" else 1
            losses[f"similarity_{domain}"] = config.lambda_similarity * components * l1(real, fake)
        return losses

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Half the sum of the real and the fake term, for each critic."""
        return dclgan.critic_losses(self.config, batch, DomainPair(outputs.fake_a, outputs.fake_b), judge)

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1]."""
        return self.generator.translate(image, direction)
