"""How official PyTorch code names the tensors of a network, and where they are here.

There a tensor's name is the path of modules to its layer, and within an `nn.Sequential` the position. The trees in the
files beside this one write these modules down in their order, with the name that a layer has here in each place;
positions follow by counting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2i_dist.method import Direction

TensorsByName = Mapping[str, Tensor]


class Norm(Enum):
    """A norm without parameters."""

    INSTANCE = "instance"


class BatchNorm(NamedTuple):
    """A batch norm, by its name here; there it also counts the batches it has seen."""

    name: str


class TrackedNorm(NamedTuple):
    """An instance norm with scale and shift, by its name here; there it also has statistics, which nothing reads."""

    name: str


class Spectral(NamedTuple):
    """A layer with spectral norm, by its name here."""

    name: str


class Idle(NamedTuple):
    """A tensor that files hold and nothing reads: what is written for it."""

    value: Tensor


class Columns(NamedTuple):
    """A layer, by its name here, with these vectors [C], which are [1, C, 1, 1] there."""

    name: str
    vectors: tuple[str, ...]


# A layer by its name here, a fixed filter [C, 1, k, k], a norm, or a layer that stores nothing.
Leaf = str | Tensor | Norm | BatchNorm | TrackedNorm | Spectral | Columns | None
# Or a sequence, or a module with named parts.
Tree = Leaf | list["Tree"] | dict[str, "Tree"]


class Network(NamedTuple):
    """One network of the official code.

    Attributes:
        place: Where it is here, for example "generator.generator_ab".
        tree: From the method's hyperparameters to its layers.
        sizes: From its tensors to the hyperparameters that can be read off them; for want of a tensor it says nothing.
        direction: Which way it translates, if it does.
        taps: Whether its layers stand for feature maps of a generator, the configuration's `nce_layers`.
        needed: Whether `translate` reads it beside the generator, so that nothing is converted without it.
        attributes: From its tensors to how many attributes its labels have; 0 if they do not tell. None for no labels.
    """

    place: str
    tree: Callable[[Any], Tree]
    sizes: Callable[[TensorsByName], dict[str, Any]]
    direction: Direction | None = None
    taps: bool = False
    needed: bool = False
    attributes: Callable[[TensorsByName], int] | None = None


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Yield the official name of every layer, and what it is, in the official order."""
    if isinstance(tree, list | dict):
        for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


class Names(NamedTuple):
    """What the file of one network holds.

    Attributes:
        tensors: Official name -> the name in our module, or the fixed filter that has to be there; in official order.
            None for a batch norm's count of batches, int64 [], which decides nothing; `Idle` for what is only written.
        unread: Official names of statistics of instance norms: files of PyTorch before 0.4 hold them, or those of norms
            that were told to keep them; nothing reads them.
        columns: Official names of tensors [1, C, 1, 1] that are [C] here.
    """

    tensors: dict[str, str | Tensor | Idle | None]
    unread: frozenset[str]
    columns: frozenset[str]


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# The suffixes of a layer with spectral norm here -> there, in the order of a file.
_SPECTRAL = {"bias": "bias", "weight": "weight_orig", "u": "weight_u", "v": "weight_v"}


def names(tree: Tree, ours: TensorsByName) -> Names:
    """Return what the official file of a network holds whose tensors are `ours` here."""
    tensors: dict[str, str | Tensor | Idle | None] = {}
    unread: set[str] = set()
    columns: set[str] = set()
    for official, leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            tensors[f"{official}.filt"] = leaf
        elif isinstance(leaf, Norm):
            unread |= {f"{official}.{name}" for name in _STATISTICS}
        elif isinstance(leaf, TrackedNorm):
            tensors |= {f"{official}.weight": f"{leaf.name}.gamma", f"{official}.bias": f"{leaf.name}.beta"}
            channels = len(ours[f"{leaf.name}.gamma"])
            idle = (torch.zeros(channels), torch.ones(channels), torch.tensor(0))
            tensors |= {f"{official}.{name}": Idle(tensor) for name, tensor in zip(_STATISTICS, idle, strict=True)}
            unread |= {f"{official}.{name}" for name in _STATISTICS}
        elif isinstance(leaf, Spectral):
            there = {f"{leaf.name}.{suffix}": f"{official}.{name}" for suffix, name in _SPECTRAL.items()}
            tensors |= {name: place for place, name in there.items() if place in ours}
        elif isinstance(leaf, Columns):
            tensors |= {f"{official}.{name}": f"{leaf.name}.{name}" for name in leaf.vectors}
            columns |= {f"{official}.{name}" for name in leaf.vectors}
        elif leaf is not None:
            layer = leaf.name if isinstance(leaf, BatchNorm) else leaf
            tensors |= {official + name[len(layer) :]: name for name in ours if name.startswith(f"{layer}.")}
            if isinstance(leaf, BatchNorm):
                tensors[f"{official}.num_batches_tracked"] = None
    return Names(tensors, frozenset(unread), frozenset(columns))


def outputs(tensors: TensorsByName, name: str, hyperparameter: str) -> dict[str, int]:
    """Return the first side of a tensor as a hyperparameter; nothing if the tensor is not there."""
    tensor = tensors.get(name)
    return {} if tensor is None or not tensor.dim() else {hyperparameter: tensor.shape[0]}


def count(tensors: TensorsByName, pattern: str) -> int:
    """Return how many names match a regular expression from end to end."""
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)
