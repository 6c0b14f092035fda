"""OP-GAN: Self-Supervised CycleGAN for Object-Preserving Image-to-Image Domain Adaptation (Xie et al., ECCV 2020).

CycleGAN's networks without its identity term, and a siamese network beside the critics that compares patches of a
picture and of its translation: what lies at the same place must have its content at the same places (content
registration), and it must be seen which domains two patches are of (domain classification). A cycle alone has nothing
against objects that are moved there and back.

No code was released, and the paper's text is known to us only through a summary: the lines below say what was published
and what is a reconstruction, which is why the only preset is called so. One thing goes beyond the summary, with which
alone the siamese network soon has one map for all patches, that registers whatever happens: `content_spread`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.config import Beta, Blocks, NotNegative, Section, Weight, Width
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.method import Direction, Gauge, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.critics import DomainPair
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patch_content import CELLS, CELLS_OF_FOUR_PAIRS, Comparison, PatchPairs, SiameseNet, cut_pairs
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.resnet import ResNetGenerator

# Maps of two patches taken at random differ by twice the square of their spread. Below this that is 2e-4, a thousandth
# of an adversarial term that neither side wins: nothing is held in its place. Random weights of the default
# widths have 0.02 and more.
_LOWEST_SPREAD = 0.01
_ADVICE = (
    "all patches have nearly the same map of where their content lies, so content registration holds no object in its "
    "place; if it stays so, raise method.content_spread or method.lambda_content"
)

# Classes of the pairs D1, D2, C1, C2 of a translation: 0 both of A, 1 both of B, 2 one of each. Reconstruction: the
# domains are those that pixels look like, and not real or made, so that both directions agree.
_DOMAINS_AB, _DOMAINS_BA = (0, 1, 2, 2), (1, 0, 2, 2)


class Hyperparameters(Section):
    """What a configuration's section `method` may say."""

    name: Literal["opgan"] = "opgan"
    preset: Literal["reconstruction"] = "reconstruction"
    width: Width = 64  # published: the networks are CycleGAN's; channels of the generators' first convolution
    blocks: Blocks = 9  # reconstruction: the number of CycleGAN's generator for 256 x 256
    critic_width: Width = 64
    siamese_width: Width = 64  # published: features of 512 channels, 8 times this
    # Reconstruction: each of the situations D1, D2, C1, C2 equally often, in both directions.
    pairs_per_image: Annotated[int, Field(ge=4, le=1_024, multiple_of=4)] = 4
    lambda_gan: Weight = 1.0
    lambda_cycle: Weight = 10.0  # published: alpha (equation 7)
    lambda_content: Weight = 1.0  # published: beta (equation 7), of both terms; the ablation leaves one of them out
    lambda_domain: Weight = 1.0
    content_spread: Weight = 0.2  # reconstruction: what the maps of a picture's patches spread by at least
    pool_size: NotNegative = 50  # reconstruction, like all that follows: CycleGAN's
    lr: Weight = 2e-4
    betas: tuple[Beta, Beta] = (0.5, 0.999)


class Outputs(NamedTuple):
    """What the generator's side makes of a batch.

    Images are [N, 3, H, W]. The translations are the fakes themselves, which the siamese network compares with the
    pictures of the batch, and so must not be given out of the pool. The cells, int64 [N, R, 7], are what it cuts out.
    """

    fake_a: Tensor
    fake_b: Tensor
    translated_a: Tensor
    translated_b: Tensor
    cells_ab: Tensor
    cells_ba: Tensor
    cycled_a: Tensor | None = None
    cycled_b: Tensor | None = None


class Generators(nn.Module):
    """The generator's side: G: A -> B and F: B -> A."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.rounds = config.pairs_per_image // 4
        size: dict[str, Any] = {"width": config.width, "blocks": config.blocks, "antialias": False}
        self.generator_ab, self.generator_ba = ResNetGenerator(**size), ResNetGenerator(**size)
        initialise(self, "normal", generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate both ways, there and back, and draw the patches of both directions."""
        images, cells = len(batch.a), (self._cells("ab", batch, draws), self._cells("ba", batch, draws))
        fake_b, _ = self.generator_ab(batch.a)
        if fakes_only:
            fake_a, _ = self.generator_ba(batch.b)
            return Outputs(fake_a, fake_b, fake_a, fake_b, *cells)
        out_a, _ = self.generator_ba(torch.cat([batch.b, fake_b]))
        fake_a, cycled_a = out_a.split(images)
        cycled_b, _ = self.generator_ab(fake_a)
        return Outputs(fake_a, fake_b, fake_a, fake_b, *cells, cycled_a, cycled_b)

    def _cells(self, direction: str, batch: Batch, draws: Draws) -> Tensor:
        rounds = [
            draws.distinct(f"cells.{direction}.{number}", batch.positions, CELLS, CELLS_OF_FOUR_PAIRS)
            for number in range(self.rounds)
        ]
        return torch.stack(rounds, dim=1).to(batch.a.device, non_blocking=True)


class CriticInput(NamedTuple):
    """Images for the critics, and pairs of patches for the siamese network: those of A to B, then those of B to A."""

    images: DomainPair
    pairs: PatchPairs


class CriticOutput(NamedTuple):
    """What critics and siamese network say."""

    logits: DomainPair
    compared: Comparison


class CriticsAndSiamese(nn.Module):
    """The discriminator's side."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        size: dict[str, Any] = {"width": config.critic_width, "antialias": False}
        self.critic_a, self.critic_b = PatchGAN(**size), PatchGAN(**size)
        self.siamese = SiameseNet(width=config.siamese_width)
        initialise(self, "normal", generator=init)

    def forward(self, shown: CriticInput) -> CriticOutput:
        """Judge images of both domains, and compare patches."""
        logits = DomainPair(self.critic_a(shown.images.a), self.critic_b(shown.images.b))
        return CriticOutput(logits, self.siamese(shown.pairs))


class OPGAN:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"reconstruction": {}}
    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("name", "width", "blocks", "critic_width", "siamese_width")
    streams: ClassVar[tuple[Stream, ...]] = ("unpaired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b", "b_to_a")
    fakes: ClassVar[tuple[str, ...]] = ("fake_a", "fake_b")
    shown: ClassVar[tuple[str, ...]] = ("translated_a", "translated_b", "cells_ab", "cells_ba")
    penalised: ClassVar[bool] = False
    multiple: ClassVar[int] = 4
    group: ClassVar[int] = 1

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size = config.pool_size
        self.couples_batch = False
        self.generator = Generators(config, init)
        self.discriminator = CriticsAndSiamese(config, init)

    def turns(self, update: int) -> tuple[Side, ...]:
        """Published: generators first; then critics and siamese network, with the translations made before."""
        return "generator", "discriminator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """One group a side; reconstruction: the siamese network is trained as the critics are."""
        lr, betas = self.config.lr, self.config.betas
        return {
            "generator": (ParameterGroup("generators", list(self.generator.parameters()), lr, betas),),
            "discriminator": (ParameterGroup("critics", list(self.discriminator.parameters()), lr, betas),),
        }

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Published (equation 7): adversarial, cycle and siamese terms of both directions.

        The siamese network is frozen, and pictures are constant: its terms move translations alone.
        """
        config = self.config
        assert outputs.cycled_a is not None and outputs.cycled_b is not None
        said = judge(CriticInput(DomainPair(outputs.fake_a, outputs.fake_b), _pairs(batch, outputs)))
        content, domain = _siamese_terms(said.compared)
        return {
            "gan_ab": config.lambda_gan * generator_loss("lsgan", said.logits.b),
            "gan_ba": config.lambda_gan * generator_loss("lsgan", said.logits.a),
            "cycle_a": config.lambda_cycle * l1(outputs.cycled_a, batch.a),
            "cycle_b": config.lambda_cycle * l1(outputs.cycled_b, batch.b),
            "content_ab": config.lambda_content * content[0],
            "content_ba": config.lambda_content * content[1],
            "domain_ab": config.lambda_domain * domain[0],
            "domain_ba": config.lambda_domain * domain[1],
        }

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Published (equations 1, 5 and 6): the critics' terms, and those of the siamese network for both directions.

        Reconstruction: the critics' terms are halved and see the pool, as in CycleGAN; the siamese network sees what
        the batch's own pictures became; and the maps of different patches of a picture are to differ.
        """
        config = self.config
        images = DomainPair(torch.cat([batch.a, outputs.fake_a]), torch.cat([batch.b, outputs.fake_b]))
        said = judge(CriticInput(images, _pairs(batch, outputs)))
        content, domain = _siamese_terms(said.compared)
        return {
            "critic_a": 0.5 * discriminator_loss("lsgan", *said.logits.a.chunk(2)),
            "critic_b": 0.5 * discriminator_loss("lsgan", *said.logits.b.chunk(2)),
            "siamese_content": config.lambda_content * (content[0] + content[1]),
            "siamese_spread": config.lambda_content * F.relu(config.content_spread - said.compared.spreads).mean(),
            "siamese_domain": config.lambda_domain * (domain[0] + domain[1]),
        }

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1]."""
        side = self.generator
        translated, _ = (side.generator_ab if direction == "a_to_b" else side.generator_ba)(image)
        assert isinstance(translated, Tensor)
        return translated

    def gauges(self) -> Mapping[str, Gauge]:
        """Watch the trivial solution of content registration: maps that are the same everywhere."""
        return {"attention_spread": Gauge(self.discriminator.siamese.spread, _LOWEST_SPREAD, _ADVICE)}


def _pairs(batch: Batch, outputs: Outputs) -> PatchPairs:
    """Return the pairs of A to B, then those of B to A, as one batch for one siamese network."""
    ab = cut_pairs(batch.a, outputs.translated_b, outputs.cells_ab)
    ba = cut_pairs(batch.b, outputs.translated_a, outputs.cells_ba)
    return PatchPairs(torch.cat([ab.source, ba.source]), torch.cat([ab.translated, ba.translated]))


def _siamese_terms(compared: Comparison) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the content terms of A to B and of B to A, and the domain terms of both."""
    apart = (compared.source_maps - compared.translated_maps).square()
    content_ab, content_ba = (half.mean() for half in apart.chunk(2))  # published (equation 5)
    logits_ab, logits_ba = compared.domains.chunk(2)
    return (content_ab, content_ba), (_misjudged(logits_ab, _DOMAINS_AB), _misjudged(logits_ba, _DOMAINS_BA))


def _misjudged(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the mean cross-entropy of logits [P, 4, 3] with the classes of the four pairs: published (equation 6)."""
    chances = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    return -torch.stack([chances[:, place, known] for place, known in enumerate(classes)]).mean()
