"""Notes every collective that a process takes part in, whoever makes it: when it began and ended, and of how much."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The methods of a process group behind which all collectives are, by the names of torch 2.11 and of 2.13.
_KINDS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "alltoall_base": "all_to_all",
    "alltoall": "all_to_all",
    "barrier": "barrier",
}


class Noted(NamedTuple):
    """A collective as one rank saw it.

    Attributes:
        kind: "all_reduce", "all_gather" and so on.
        bytes: Of the whole tensor, over all ranks: what is reduced, or gathered, or scattered.
        arrived: When this rank came to it; seconds of `time.monotonic`, which all processes of a machine share.
        left: When it went on, with the result there.
        on_a_core: Seconds between that the thread which asked for it was running.
    """

    kind: str
    bytes: int
    arrived: float
    left: float
    on_a_core: float


@contextlib.contextmanager
def noted(device: torch.device) -> Iterator[list[Noted]]:
    """Note the collectives within. Each is waited for at once, on a GPU after what came before it: nothing overlaps."""
    log: list[Noted] = []
    group = torch.distributed.ProcessGroup
    # As they stand in the class: what getattr returns of a compiled method would not be bound again.
    before = {name: vars(group)[name] for name in _KINDS if name in vars(group)}
    for name in before:
        setattr(group, name, _noting(log, _KINDS[name], getattr(group, name), device))
    try:
        yield log
    finally:
        for name, method in before.items():
            setattr(group, name, method)


def _noting(log: list[Noted], kind: str, method: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        settle(device)
        arrived, running = time.monotonic(), time.thread_time()
        work = method(*arguments, **named)
        if work is not None:  # NCCL returns none of what is not asked for as asynchronous
            work.wait()
        settle(device)
        size = max(map(_bytes, [*arguments, *named.values()]))
        log.append(Noted(kind, size, arrived, time.monotonic(), time.thread_time() - running))
        return work

    return call


def settle(device: torch.device) -> None:
    """Wait for what the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return int(value.nbytes)
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Shares(NamedTuple):
    """Seconds that a rank spent in collectives: before the last rank had come, and from then on."""

    waiting: float
    communicating: float


def shares(logs: Sequence[Sequence[Noted]]) -> list[Shares]:
    """Divide the collectives that all ranks of a machine noted, each rank's in the same order.

    Raises:
        ValueError: The ranks did not note the same collectives.
    """
    kinds = {tuple(one.kind for one in log) for log in logs}
    if len(kinds) != 1:
        raise ValueError(f"the ranks noted {sorted(map(len, logs))} collectives, of other kinds or numbers on each")
    last = [max(one.arrived for one in calls) for calls in zip(*logs, strict=True)]
    found = []
    for log in logs:
        # A rank may be done before the last one comes, where it only sends.
        met = [min(max(one.arrived, when), one.left) for one, when in zip(log, last, strict=True)]
        waiting = sum(when - one.arrived for one, when in zip(log, met, strict=True))
        found.append(Shares(waiting, sum(one.left - when for one, when in zip(log, met, strict=True))))
    return found
