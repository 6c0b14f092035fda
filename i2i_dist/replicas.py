"""Whether all ranks still hold the same: what is trained on many ranks alike must stay the same bit for bit.

A rank that has drifted away (a fault of memory or of a link, other software) trains on without an error, and what it
spoils is found in pictures, if at all.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from i2i_dist.distributed import gather_numbers, gather_texts
from i2i_dist.engine_state import persistent_buffers
from i2i_dist.engines import SideEngine
from i2i_dist.step import Sides

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements; what is made for them in passing takes 16 MiB
_RANKS_NAMED = 4


def checksum(tensor: Tensor) -> Tensor:
    """Return an int64 scalar, on the device, of a tensor's bits and their places.

    A sum of products of integers, modulo 2 ** 64: exact, in whatever order it is added up, and other for any one bit
    that is other, since places count by odd numbers. These are scattered: 1, 3, 5 and so on add up to powers of two,
    which would make constants of many sizes the same.
    """
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    weights = _weights(min(bits.numel(), _CHUNK), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        total = total * 31 + (chunk.to(torch.int64) * weights[: chunk.numel()]).sum()
    return total


def _weights(count: int, device: torch.device) -> Tensor:
    """Return odd numbers, int64, scattered by the steps of a hash (Steele et al. 2014)."""
    numbers = torch.arange(1, count + 1, device=device) * -7046029254386353131
    return (numbers ^ (numbers >> 31)) * -4658895280553007687 | 1


def replicated(side: SideEngine) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of what every rank holds whole: parameters, unless ZeRO 3 cuts them, and buffers."""
    for name, parameter in side.module.named_parameters():
        if side.layout.stage < 3 or parameter.ds_persist:  # type: ignore[attr-defined]
            yield name, parameter
    yield from persistent_buffers(side.module).items()


def difference(sides: Sides) -> str | None:
    """Return None where all ranks hold the same, or which do not and the first tensor that differs. Collective."""
    sums = {f"the {side}'s {name}": checksum(tensor) for side in sides for name, tensor in replicated(sides[side])}
    if not sums:  # at ZeRO 3 without small parameters and buffers every element is held once
        return None
    every = torch.stack(list(sums.values()))
    if len({*_rows(gather_numbers(checksum(every).reshape(1)))}) == 1:
        return None
    found = _rows(gather_numbers(every))
    hosts = gather_texts(socket.gethostname())
    for place, name in enumerate(sums):
        column = [row[place] for row in found]
        if len(set(column)) > 1:
            return f"{name} is not the same on all ranks: {_who(column, hosts)}"
    raise AssertionError("what differs together must differ one by one")


def _rows(gathered: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in gathered.tolist()]


def _who(values: Sequence[int], hosts: Sequence[str]) -> str:
    """Say whose value is unlike that of most ranks, or that no value is that of most."""
    (usual, times), *_ = Counter(values).most_common()
    if 2 * times <= len(values):
        return f"{_named(range(len(values)), hosts)} differ, and no majority tells which is right"
    odd = [rank for rank, value in enumerate(values) if value != usual]
    return f"{_named(odd, hosts)} {'differs' if len(odd) == 1 else 'differ'} from the other {times}"


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = [f"{rank} ({hosts[rank]})" for rank in ranks[:_RANKS_NAMED]]
    if len(ranks) > _RANKS_NAMED:
        named.append(f"{len(ranks) - _RANKS_NAMED} more")
    return f"ranks {', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else f"rank {named[0]}"
