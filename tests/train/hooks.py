"""Faults: functions that a test has called in a run's process before the run begins."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from i2i_dist import loop, run_directory
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


def nan_in_updates_3_and_4() -> None:
    _before_updates(lambda number, sides, batches: _spoil(batches) if number in (3, 4) else None)


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


def samples_are_noted() -> None:
    """Append a line for each sample that an update is given, its position and a digest of its pictures, to $SAMPLES."""
    real = loop.to_device

    def noted(host: Any, device: Any) -> Any:
        with open(os.environ["SAMPLES"], "a", encoding="utf-8") as file:
            file.writelines(sample_lines(host))
        return real(host, device)

    loop.to_device = noted


def sample_lines(host: Any) -> list[str]:
    digests = [
        hashlib.sha256(b"".join(host.images[domain][row].numpy().tobytes() for domain in "ab")).hexdigest()
        for row in range(len(host.positions))
    ]
    return [f"{position} {digest}\n" for position, digest in zip(host.positions.tolist(), digests, strict=True)]


def reading_processes_are_lost() -> None:
    """One is killed before update 10, and one stopped before update 14; $PAGE holds the metrics before update 23."""
    samples_are_noted()

    def change(number: int, sides: Any, batches: Any) -> None:
        if fault := {10: signal.SIGKILL, 14: signal.SIGSTOP}.get(number):
            os.kill(multiprocessing.active_children()[0].pid or 0, fault)
        if number == 23:
            with urllib.request.urlopen(f"http://127.0.0.1:{os.environ['PORT']}/metrics", timeout=60) as page:
                Path(os.environ["PAGE"]).write_bytes(page.read())

    _before_updates(change)
