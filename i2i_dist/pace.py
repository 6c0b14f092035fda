"""How fast every rank works by itself, so that the one that holds up all others is found.

All updates take equally long on all ranks, since they wait for each other. What a rank does before it waits for the
first time in an update is its own: it waits for data and runs the forward passes up to the first backward.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

WINDOW = 16  # updates whose median counts; one hiccup is none
LOWEST_SCORE = 0.75

# The processor's time on CPUs; on GPUs a place in the stream of work, whose time is read later, without a wait.
Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Return this moment of `device`: that at which it has done what it has been given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first: Moment, last: Moment) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float) and isinstance(last, float)
        return last - first
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1000.0


class Pace:
    """Collects how long this rank's own work takes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = moment(device)
        self._spans: deque[tuple[Moment, Moment]] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """Mark the begin of an update, before its first batch is asked for."""
        self._begun = moment(self._device)

    def end(self, ready: Moment) -> None:
        """Take in the moment at which the update's first backward could begin."""
        self._spans.append((self._begun, ready))

    def seconds(self) -> float:
        """Return the median duration of the last `WINDOW` updates' own work; 0 as long as there are fewer."""
        if len(self._spans) < WINDOW:
            return 0.0
        return statistics.median(_seconds(first, last) for first, last in self._spans)


def scores(seconds: Sequence[float]) -> list[float]:
    """Return each rank's score: the median of the other ranks' seconds divided by its own.

    1 is as fast as the others, 0.5 takes twice as long. It is 1 where there are no others, or nothing is known yet. The
    median is of the others alone, since of two ranks the slow one would be half of it.
    """
    if len(seconds) < 2 or min(seconds) <= 0:
        return [1.0] * len(seconds)
    ordered = sorted(seconds)
    return [_median_without(ordered, own) / own for own in seconds]


def _median_without(ordered: Sequence[float], own: float) -> float:
    """Return the median of `ordered` less one `own`, without a copy for each of thousands of ranks."""
    count = len(ordered) - 1
    place, middle = ordered.index(own), []
    for wanted in ((count - 1) // 2, count // 2):
        middle.append(ordered[wanted if wanted < place else wanted + 1])
    return sum(middle) / 2
