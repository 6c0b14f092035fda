"""The protocol behind which every paper stands: two sides, their losses, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from i2i_dist.data.labels import LabelSpace

Side = Literal["generator", "discriminator"]
SIDES: tuple[Side, Side] = ("generator", "discriminator")
Direction = Literal["a_to_b", "b_to_a"]
# "unpaired": two domains on their own. "paired": pictures of the same name. "labelled", "unlabelled": one domain, A, of
# which the method is told the labels of some pictures; "labelled" draws from these, "unlabelled" from the others.
Stream = Literal["unpaired", "paired", "labelled", "unlabelled"]

# Name -> scalar that already carries its weight; a side's loss is the sum of all of them.
Losses = dict[str, Tensor]

# The discriminator side as the losses see it: the method's own CriticInput -> its own CriticOutput. In the
# discriminator's turn it trains; in the generator's turn it is frozen and only passes gradients on to the images.
Judge = Callable[[Any], Any]


class ParameterGroup(NamedTuple):
    """Parameters that share hyperparameters of Adam.

    Attributes:
        name: What its learning rate is called in logs.
        parameters: Its parameters.
        lr: The rate at factor 1 of the schedule.
        betas: Decay of the two moments.
        weight_decay: Coupled: this times the parameter is added to its gradient.
        bounds: Lowest and highest value, which every element is clamped to after each step; None for no bounds.
        constant: Share of the rate, in [0, 1], that the schedule leaves alone.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    bounds: tuple[float, float] | None = None
    constant: float = 0.0


class Gauge(NamedTuple):
    """A number that tells whether training goes where it should, and is in no loss.

    Attributes:
        value: Scalar, of what this rank's networks have lately seen.
        lowest: Below it training is likely stuck.
        advice: What it then means and what to try, to be read after "NAME is 0.004, below 0.01: ".
    """

    value: Tensor
    lowest: float
    advice: str


class Method(Protocol):
    """A paper. No base class: a method's file shows all that happens.

    Each side is one module whose only entry is `forward`:
    `generator(batch, draws, fakes_only=False) -> Outputs` and `discriminator(CriticInput) -> CriticOutput`. The batch
    is what the method's streams are made of: `Batch`, or `LabelledBatch`. Outputs is a NamedTuple of the method's own;
    the critics' input and output are one too, a dict, or a tensor. With `fakes_only` the generator makes the same
    fakes, and what is shown with them, and nothing else, for a discriminator's turn without a shared graph.
    """

    Config: ClassVar[type[BaseModel]]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]  # preset, default first -> values that differ from Config's
    ARCHITECTURE: ClassVar[tuple[str, ...]]  # keys of Config that decide which parameters there are
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
    def streams(self) -> tuple[Stream, ...]:
        """What feeds one update after the other, over and over; all are of the same kind of data set."""

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
        """The fields of Outputs that the discriminator sees, detached and by way of the pool.

        One whose name ends in `_a` belongs to domain A and is made from B, any other belongs to B and is made from A;
        with labels all belong to the one domain. `i2i_dist.collapse` compares them with its pictures.
        """

    @property
    def shown(self) -> tuple[str, ...]:
        """Other fields that it sees, detached, and always of the very batch; what is in neither has a default."""

    @property
    def penalised(self) -> bool:
        """Whether the discriminator's forward differentiates itself, for a penalty: it then cannot be cut by ZeRO 3."""

    def turns(self, update: int) -> tuple[Side, ...]:
        """Say which sides train in update number `update`, in order, on the same images: the discriminator always."""

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """Every trained parameter, exactly once."""

    def generator_loss(self, batch: Any, outputs: Any, judge: Judge, images_seen: int) -> Losses:
        """What the generator's side minimises."""

    def discriminator_loss(self, batch: Any, outputs: Any, judge: Judge, images_seen: int) -> Losses:
        """What the discriminator's side minimises; `outputs` holds only the fakes, detached, from the pool."""

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate float images [N, 3, H, W] in [-1, 1], H and W divisible by `multiple`, each as if it were alone."""


@runtime_checkable
class Attentive(Protocol):
    """A method whose generators tell where they look."""

    def attend(self, image: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """Return what `translate` does, and of the same pass heat maps [N, 1, h, w]: any scale, high where it looks."""


@runtime_checkable
class Gauged(Protocol):
    """A method with numbers that are watched while it trains."""

    def gauges(self) -> Mapping[str, Gauge]:
        """Return them by name, the same names at all times."""


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


@runtime_checkable
class Labelled(Protocol):
    """A method that translates a picture into what has the labels asked for; its streams are labelled ones.

    `translate` takes the first class of the space.
    """

    @property
    def label_space(self) -> LabelSpace:
        """The attributes, and which of their combinations are valid."""

    @property
    def labelled_fraction(self) -> float:
        """How many of the pictures the method is told the labels of, as a share in (0, 1]."""

    @property
    def labelled_group(self) -> tuple[int, int] | None:
        """How many classes, and pictures of each in a row, a group of the stream "labelled" has; None for no groups."""

    def translate_labelled(self, image: Tensor, labels: Tensor) -> Tensor:
        """Translate images [N, 3, H, W] as `translate` does, each into its own row of `labels` [N, L] of 0 and 1."""
