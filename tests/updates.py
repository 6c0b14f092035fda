"""Updates in tests: a small version of each method, images of its size, and arithmetic without rounding's accidents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from i2i_dist.data.batch import Batch
from i2i_dist.distributed import rank_and_world
from i2i_dist.method import SIDES
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


class ExactForward(TorchFunctionMode):
    """Convolutions and linear layers compute in the dtype of their input, fp64 here, from their fp32 weights.

    Rounding in fp32 now and then carries a value over a kink (ReLU, L1), and from there two runs drift apart whatever
    the engines do. In fp64 what remains is the arithmetic under test: reduction, sharding, optimizer.
    """

    LAYERS = (F.conv2d, F.conv_transpose2d)

    def __enter__(self) -> Any:
        # ZeRO 3 puts a function of its own in place of F.linear, which this mode does not get to see.
        self.linear, F.linear = F.linear, self.exact_linear
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        F.linear = self.linear
        super().__exit__(*failure)

    def exact_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = self.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return result

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.LAYERS:
            args = [arg.to(args[0].dtype) if isinstance(arg, Tensor) else arg for arg in args]
        return function(*args, **(kwargs or {}))


def images(step: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of an update, float64 [N, 3, SIZE, SIZE] for each domain."""
    draw = torch.Generator().manual_seed(100 + step)
    a = torch.rand(GLOBAL_BATCH, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1
    b = (torch.rand(GLOBAL_BATCH, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1).abs()
    return a, b


def whole_batch(step: int) -> Batch:
    """Return the global batch of an update."""
    return Batch(*images(step), torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH, step * GLOBAL_BATCH)


def part_of(batch: Any, samples: slice) -> Any:
    """Return some samples of a batch of any kind."""
    return type(batch)(*(field[samples] if isinstance(field, Tensor) else field for field in batch))


def micro_batches(step: int, accumulation: int) -> list[Batch]:
    """Return this rank's share of an update."""
    rank, world = rank_and_world()
    size = GLOBAL_BATCH // world // accumulation
    firsts = range(rank * accumulation * size, (rank + 1) * accumulation * size, size)
    return [part_of(whole_batch(step), slice(first, first + size)) for first in firsts]
