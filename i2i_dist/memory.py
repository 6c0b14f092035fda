"""How much memory a side's state takes on each rank, from its parameters' sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from i2i_dist.engines import PERSISTENCE_THRESHOLD, bucket_elements
from i2i_dist.method import ParameterGroup

_FP32 = 4  # bytes of an element: parameters, gradients and moments are fp32 in either precision


class SideMemory(NamedTuple):
    """Bytes on the rank that holds most, in the steady state.

    Attributes:
        parameters: What the networks compute with.
        gradients: Of one update, when a backward pass ends.
        optimizer: Adam's two moments and, from ZeRO 1 on, a copy of the rank's share of the parameters.
        averages: The rank's share of the averaged generators.
        bucket: The buffer that gradients are reduced in; at ZeRO 1 and 2 it is there during a backward pass alone.
        passing: What is there for a while and more than that. At the step, from ZeRO 1 on, a copy of a group's share of
            the gradients, at ZeRO 1 and 2 in place of the bucket. At ZeRO 3, the whole of the largest parameter and of
            its gradient, while its layer runs; DeepSpeed may keep more layers whole, up to a billion elements.
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


class Offloaded(NamedTuple):
    """Bytes where the optimizer is offloaded: on the device, and in CPU memory."""

    device: int
    host: int


def side_memory(
    module: nn.Module, groups: Sequence[ParameterGroup], stage: int, world: int, averaged: bool
) -> SideMemory:
    """Count what one rank holds of a side; `module` may lie on the meta device.

    What DeepSpeed 0.19 does with fp32 parameters, P of them on N ranks: ZeRO 0 holds P parameters, gradients, and 2 P
    moments. ZeRO 1 and 2 are alike here: P parameters, P / N copies of them, 2 P / N moments, and gradients of all
    parameters that the rank's share touches, whole, if there is one micro-batch. At the step the share of one group is
    copied out of them, unless it lies in one parameter. ZeRO 3 holds P / N of everything, and small parameters whole
    besides. Shares are rounded up to a few elements more, which is not counted.
    """
    sizes = [[parameter.numel() for parameter in group.parameters] for group in groups]
    elements = sum(map(sum, sizes))
    share = -(-elements // world)
    bucket = bucket_elements(module) if stage else 0
    if stage == 0:
        parameters, gradients, optimizer, passing = elements, elements, 2 * elements, 0
    elif stage == 3:
        small = sum(size for group in sizes for size in group if size < PERSISTENCE_THRESHOLD)
        parameters, gradients, optimizer = share + small, share, 3 * share
        passing = max(2 * max(map(max, sizes)), max(-(-sum(group) // world) for group in sizes))
    else:
        parameters, optimizer = elements, 3 * share
        ranks = [[_touched(group, rank, world) for group in sizes] for rank in range(world)]
        each = [(sum(one for one, _ in touched), max(copied for _, copied in touched)) for touched in ranks]
        gradients, copied = max(each, key=lambda one: one[0] + max(one[1], bucket))
        passing = max(0, copied - bucket)
    counts = parameters, gradients, optimizer, share if averaged else 0, bucket, passing
    return SideMemory(*(_FP32 * count for count in counts))


def offloaded_memory(
    module: nn.Module, groups: Sequence[ParameterGroup], stage: int, world: int, averaged: bool
) -> Offloaded:
    """Count what lies where with the optimizer's state in CPU memory, at ZeRO 1 to 3.

    There DeepSpeed has the share of the parameters, its moments, its gradients, and one more copy of the share, of the
    parameters at ZeRO 1 and 2 and of the gradients at 3; the averages are taken of the first. At ZeRO 1 and 2 both
    memories also hold a buffer for the largest parameter. As above, an update is one micro-batch.
    """
    kept = side_memory(module, groups, stage, world, averaged)
    sizes = [parameter.numel() for group in groups for parameter in group.parameters]
    largest = _FP32 * max(sizes)
    host = 5 * _FP32 * -(-sum(sizes) // world) + kept.averages
    if stage == 3:
        return Offloaded(kept.parameters + kept.bucket + 2 * largest, host)
    return Offloaded(kept.parameters + kept.bucket + largest, host + largest)


def _touched(sizes: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """Of parameters laid one after the other, return the elements of those that a rank's share holds some of.

    With it comes the number of elements that the step copies: the share's, or none where it lies in one parameter.
    """
    share = -(-sum(sizes) // world)
    first, after, start = rank * share, (rank + 1) * share, 0
    found = []
    for size in sizes:
        if start < after and start + size > first:
            found.append(size)
        start += size
    return sum(found), 0 if len(found) == 1 and after <= start else share
