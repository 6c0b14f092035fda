"""How much memory a side's state takes on each rank, from its parameters' sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from i2i_dist.engines import PERSISTENCE_THRESHOLD, bucket_elements
from i2i_dist.method import ParameterGroup

_FP32 = 4  # bytes of an element: parameters, gradients and moments are fp32 in either precision


class SideMemory(NamedTuple):
    """Bytes on the rank that holds most, in the steady state, when a backward pass ends.

    Attributes:
        parameters: What the networks compute with.
        gradients: Of one update.
        optimizer: Adam's two moments and, from ZeRO 1 on, a copy of the rank's share of the parameters.
        averages: The rank's share of the averaged generators.
        bucket: The buffer that gradients are reduced in; at ZeRO 1 and 2 it is there during a backward pass alone.
        passing: At ZeRO 3, the whole of the largest parameter and of its gradient, while its layer runs; DeepSpeed may
            keep more layers whole, up to a billion elements.
    """

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    bucket: int
    passing: int

    @property
    def whole(self) -> int:
        """All of it, on the device."""
        return sum(self)

    @property
    def offloaded(self) -> int:
        """What would lie in CPU memory if the optimizer's state did: gradients and averages go with it."""
        return self.optimizer + self.averages + self.gradients


def side_memory(
    module: nn.Module, groups: Sequence[ParameterGroup], stage: int, world: int, averaged: bool
) -> SideMemory:
    """Count what one rank holds of a side; `module` may lie on the meta device.

    What DeepSpeed 0.19 does with fp32 parameters, P of them on N ranks: ZeRO 0 holds P parameters, gradients, and 2 P
    moments. ZeRO 1 and 2 are alike here: P parameters, P / N copies of them, 2 P / N moments, and gradients of all
    parameters that the rank's share touches, whole, if there is one micro-batch. ZeRO 3 holds P / N of everything, and
    small parameters whole besides. Shares are rounded up to a few elements more, which is not counted.
    """
    sizes = [[parameter.numel() for parameter in group.parameters] for group in groups]
    elements = sum(map(sum, sizes))
    share = -(-elements // world)
    if stage == 0:
        parameters, gradients, optimizer = elements, elements, 2 * elements
    elif stage == 3:
        small = sum(size for group in sizes for size in group if size < PERSISTENCE_THRESHOLD)
        parameters, gradients, optimizer = share + small, share, 3 * share
    else:
        parameters, optimizer = elements, 3 * share
        gradients = max(sum(_touched(group, rank, world) for group in sizes) for rank in range(world))
    bucket = bucket_elements(module) if stage else 0
    passing = 2 * max(max(group) for group in sizes) if stage == 3 else 0
    counts = parameters, gradients, optimizer, share if averaged else 0, bucket, passing
    return SideMemory(*(_FP32 * count for count in counts))


def _touched(sizes: Sequence[int], rank: int, world: int) -> int:
    """Return the elements of all parameters, laid one after the other, of which a rank's share holds some."""
    share = -(-sum(sizes) // world)
    first, after, start, touched = rank * share, (rank + 1) * share, 0, 0
    for size in sizes:
        touched += size if start < after and start + size > first else 0
        start += size
    return touched
