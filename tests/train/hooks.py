"""Faults: functions that a test has called in a run's process before the run begins."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from prometheus_client import generate_latest
from torch import nn

from i2i_dist import loop, reporter, run_directory
from i2i_dist.data import reader
from i2i_dist.data.batch import BadData

FILE_LIMIT = 40_000  # bytes: less than one side of a checkpoint, more than everything else that a short run writes


def files_stay_small() -> None:
    """What a full disk does, to large files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))


def nothing_can_be_read() -> None:
    def broken(data: bytes) -> Any:
        raise BadData("broken on purpose")

    reader.decode_image = broken


def _before_updates(change: Callable[[int, Any, Any], None]) -> None:
    real = loop.update

    def update(method: Any, sides: Any, batches: Any, *arguments: Any, number: int, **named: Any) -> Any:
        change(number, sides, batches)
        return real(method, sides, batches, *arguments, number=number, **named)

    loop.update = update


def _spoil(batches: Any) -> None:
    batches[0].a.fill_(float("nan"))


def nan_from_update_5() -> None:
    _before_updates(lambda number, sides, batches: _spoil(batches) if number >= 5 else None)


def nan_in_update_3_and_in_a_gradient_of_update_4() -> None:
    """The losses of update 4 are finite."""

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 3:
            _spoil(batches)
        if number == 4:
            layer = next(one for one in sides["generator"].module.modules() if isinstance(one, nn.Conv2d))

            def spoil(layer: Any, inputs: Any, output: torch.Tensor) -> None:
                handle.remove()
                output.register_hook(lambda gradient: gradient * float("nan"))

            handle = layer.register_forward_hook(spoil)

    _before_updates(change)


EQUAL, SLOW = 17, 28  # updates: before EQUAL ranks work equally long; then one is slow, and at SLOW a weight is another


def _keep_the_metrics() -> None:
    """Leave in the run's directory what a last scrape would find."""
    real = reporter.Reporter.close

    def close(self: Any) -> None:
        if self.metrics is not None:
            (self.stats.path.parent / "metrics.txt").write_bytes(generate_latest(self.metrics.registry))
        real(self)

    reporter.Reporter.close = close  # type: ignore[method-assign]


def steady_while_the_clock_is_set_back() -> None:
    """Every update takes a while of its own; in the third an hour is taken from the clock."""
    real = time.time

    def change(number: int, sides: Any, batches: Any) -> None:
        time.sleep(0.2)
        if number == 3:
            time.time = lambda: real() - 3600.0

    _keep_the_metrics()
    _before_updates(change)


def slow_and_then_with_another_weight() -> None:
    def change(number: int, sides: Any, batches: Any) -> None:
        time.sleep(0.2 if number < EQUAL else 0.8)
        if number == SLOW:
            name, weight = list(sides["generator"].module.named_parameters())[5]
            weight.data.view(-1).view(torch.int32)[0] ^= 1 << 12
            print(f"another weight: {name}.", flush=True)

    _before_updates(change)


def error_at_update_3() -> None:
    """An error of a kind that nothing foresees."""

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 3:
            raise KeyError("unforeseen")

    _before_updates(change)


def infinite_weight_at_update_5() -> None:
    """A weight that no forward pass notices: a bias in front of an instance norm."""

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 5:
            moments = sides["generator"].optimizer.state
            next(iter(moments.values()))["exp_avg_sq"].fill_(float("inf"))

    _before_updates(change)


def another_run_directory() -> None:
    """What a rank meets on a machine with a disk of its own."""
    real = run_directory.check_shared
    run_directory.check_shared = lambda directory: real(directory / "elsewhere")
