"""Updates in tests: a small version of each method, images of its size, and arithmetic without rounding's accidents."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.distributed import rank_and_world
from i2i_dist.method import SIDES, Labelled
from i2i_dist.methods import resolve
from tests.methods.cases import CASES
from tests.methods.cases.common import GLOBAL_BATCH, SIZE


def small_method(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return the small version of a method, with weights and biases of some size, so that a few steps go somewhere.

    Of what has bounds, half lies at them, so that a step throws some of it out.
    """
    method, config = resolve({"name": name, **CASES[name].small, **changes})
    built: Any = method(config, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for side in SIDES:
            for parameter in getattr(built, side).parameters():
                parameter.mul_(CASES[name].scale).add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
            for group in built.parameter_groups()[side]:
                for parameter in group.parameters if group.bounds else ():
                    low, high = group.bounds
                    reach = (high - low) / 2
                    parameter.uniform_(low - reach, high + reach, generator=draw).clamp_(low, high)
    return built


class ExactForward:
    """Convolutions and linear layers compute in the dtype of their input, fp64 here, from their fp32 weights.

    Rounding in fp32 now and then carries a value over a kink (ReLU, L1), and from there two runs drift apart whatever
    the engines do. In fp64 what remains is the arithmetic under test: reduction, sharding, optimizer.
    """

    LAYERS = ("conv2d", "conv_transpose2d", "linear")

    def __enter__(self) -> None:
        self.layers = {name: getattr(F, name) for name in self.LAYERS}
        for name, layer in self.layers.items():
            setattr(F, name, functools.partial(self.exact, layer))

    def __exit__(self, *failure: Any) -> None:
        for name, layer in self.layers.items():
            setattr(F, name, layer)

    @staticmethod
    def exact(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = layer(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *args, **kwargs)
        return result


def global_batch(method: Any) -> int:
    """Return how many samples an update of a small method has."""
    return CASES[method.config.name].batch


def images(step: int, count: int = GLOBAL_BATCH) -> tuple[Tensor, Tensor]:
    """Return the global batch of an update, float64 [N, 3, SIZE, SIZE] for each domain."""
    draw = torch.Generator().manual_seed(100 + step)
    a = torch.rand(count, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1
    b = (torch.rand(count, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1).abs()
    return a, b


def labels(method: Any, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Return valid labels of samples, in groups where the method wants them, and of others: float64 [N, L]."""
    draw = torch.Generator().manual_seed(200 + step)
    classes = torch.from_numpy(method.label_space.classes).double()
    others = torch.randint(len(classes), (count,), generator=draw)
    different, each = method.labelled_group or (1, 1)
    groups = [torch.randperm(len(classes), generator=draw)[:different] for _ in range(count // (different * each))]
    return classes[torch.cat(groups).repeat_interleave(each)], classes[others]


def whole_batch(method: Any, step: int) -> Any:
    """Return the global batch of an update, of the kind that the method takes and from the stream whose turn it is."""
    count = global_batch(method)
    pictures, positions, first = images(step, count), torch.arange(count) + step * count, step * count
    if not isinstance(method, Labelled):
        return Batch(*pictures, positions, first)
    stream = method.streams[step % len(method.streams)]  # type: ignore[attr-defined]
    told = labels(method, step, count) if stream == "labelled" else (None, None)
    return LabelledBatch(pictures[0], *told, positions, first)


def in_fp32(batch: Any) -> Any:
    """Return a batch of any kind in fp32."""
    fields = (x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch)
    return type(batch)(*fields)


def part_of(batch: Any, samples: slice) -> Any:
    """Return some samples of a batch of any kind."""
    return type(batch)(*(field[samples] if isinstance(field, Tensor) else field for field in batch))


def micro_batches(method: Any, step: int, accumulation: int) -> list[Any]:
    """Return this rank's share of an update."""
    rank, world = rank_and_world()
    size = global_batch(method) // world // accumulation
    firsts = range(rank * accumulation * size, (rank + 1) * accumulation * size, size)
    return [part_of(whole_batch(method, step), slice(first, first + size)) for first in firsts]


def stages_of(method: Any, stage: int) -> tuple[int, int]:
    """Return a ZeRO stage for both sides, or the highest that the critics can have."""
    return stage, min(stage, 2) if method.penalised else stage
