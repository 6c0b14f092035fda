"""The protocol behind which every paper stands: two sides, their losses, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from i2i_dist.data.batch import Batch

Side = Literal["generator", "discriminator"]
SIDES: tuple[Side, Side] = ("generator", "discriminator")
Direction = Literal["a_to_b", "b_to_a"]

# Name -> scalar that already carries its weight; a side's loss is the sum of all of them.
Losses = dict[str, Tensor]

# The discriminator side as the losses see it: the method's own CriticInput -> its own CriticOutput. In the
# discriminator's turn it trains; in the generator's turn it is frozen and only passes gradients on to the images.
Judge = Callable[[Any], Any]


class Turn(NamedTuple):
    """One side's turn in an update.

    Attributes:
        side: Who trains.
        stream: Which stream of the method's `streams` feeds it.
        fresh_batch: Whether new images are drawn for it, or those of the turn before are used again.
    """

    side: Side
    stream: str
    fresh_batch: bool


class ParameterGroup(NamedTuple):
    """Parameters that share hyperparameters of Adam.

    Attributes:
        name: What its learning rate is called in logs.
        parameters: Its parameters.
        lr: The rate at factor 1 of the schedule.
        betas: Decay of the two moments.
        weight_decay: Coupled: this times the parameter is added to its gradient.
        bounds: Lowest and highest value, which every element is clamped to after each step; None for no bounds.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    bounds: tuple[float, float] | None = None


class Method(Protocol):
    """A paper. No base class: a method's file shows all that happens.

    Each side is one module whose only entry is `forward`:
    `generator(batch, draws, fakes_only=False) -> Outputs` and `discriminator(CriticInput) -> CriticOutput`. Outputs is
    a NamedTuple of the method's own; the critics' input and output are one too, a dict, or a tensor. With `fakes_only`
    the generator makes the same fakes and nothing else, for a discriminator's turn without a shared graph.
    """

    Config: ClassVar[type[BaseModel]]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]  # preset -> values that differ from Config's defaults
    ARCHITECTURE: ClassVar[tuple[str, ...]]  # keys of Config that decide which parameters there are
    streams: ClassVar[tuple[str, ...]]  # "unpaired": two domains on their own; "paired": pictures of the same name
    directions: ClassVar[tuple[Direction, ...]]

    def __init__(self, config: Any, init: torch.Generator) -> None:
        """Build both sides; `init` is the generator that the initial weights are drawn from."""

    @property
    def generator(self) -> nn.Module:
        """The generator's side: generators, heads, encoders."""

    @property
    def discriminator(self) -> nn.Module:
        """The discriminator's side: critics."""

    @property
    def pool_size(self) -> int:
        """Fakes per domain that the image pool holds; 0 means none."""

    @property
    def couples_batch(self) -> bool:
        """Whether a sample's loss depends on the other samples of the global batch, which then must be one pass."""

    @property
    def multiple(self) -> int:
        """What height and width of every picture must be a multiple of."""

    @property
    def group(self) -> int:
        """How many samples of consecutive positions belong together: they are in the same pass of the same rank."""

    @property
    def fakes(self) -> tuple[str, ...]:
        """The fields of Outputs that the discriminator sees, detached and by way of the pool; the rest has defaults."""

    def turns(self, update: int) -> tuple[Turn, ...]:
        """Say what update number `update` does, in order."""

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """Every trained parameter, exactly once."""

    def generator_loss(self, batch: Batch, outputs: Any, judge: Judge, images_seen: int) -> Losses:
        """What the generator's side minimises."""

    def discriminator_loss(self, batch: Batch, outputs: Any, judge: Judge, images_seen: int) -> Losses:
        """What the discriminator's side minimises; `outputs` holds only the fakes, detached, from the pool."""

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate float images [N, 3, H, W] in [-1, 1], H and W divisible by `multiple`, each as if it were alone."""


@runtime_checkable
class Attentive(Protocol):
    """A method whose generators tell where they look."""

    def attend(self, image: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """Return what `translate` does, and of the same pass heat maps [N, 1, h, w]: any scale, high where it looks."""


@runtime_checkable
class Styled(Protocol):
    """A method that has many translations for an image, one for each code: a vector of `style_dim` numbers.

    Codes are drawn from N(0, 1). `translate` takes the code 0.
    """

    @property
    def style_dim(self) -> int:
        """How many numbers a code has."""

    @property
    def encodes(self) -> bool:
        """Whether `encode` can be used: some models have no encoder."""

    def encode(self, image: Tensor) -> Tensor:
        """Return the codes [N, style_dim] of images [N, 3, H, W] of the target domain, each as if it were alone."""

    def translate_styled(self, image: Tensor, codes: Tensor) -> Tensor:
        """Translate images [N, 3, H, W] as `translate` does, each with its own row of `codes` [N, style_dim]."""
