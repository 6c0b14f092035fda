"""Which checkpoints stay, and how much room they take."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from i2i_dist import canonical
from i2i_dist.checkpoint import CheckpointError, newest_first, read_state
from i2i_dist.engine_state import Captured
from i2i_dist.pool import ImagePools

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Keep(NamedTuple):
    """Which checkpoints stay when a newer one is there.

    Attributes:
        last: So many of the newest.
        every: And the first at or after each multiple of so many images seen; None for none.
        best: And the one with the lowest mean of this loss or gauge since the checkpoint before; None for none.
    """

    last: int
    every: int | None = None
    best: str | None = None

    def at_most(self, target: int, interval: int) -> int:
        """Return how many lie on the disk at once in a run up to `target` images, with the one being written."""
        lasting = target // self.every if self.every else 0
        return min(self.last + lasting + bool(self.best) + 1, max(1, math.ceil(target / interval)))


class Scores:
    """Means of losses and gauges over the records since a checkpoint."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def note(self, values: Mapping[str, float], updates: int) -> None:
        """Take in the values of a record, means over so many updates."""
        for name, value in values.items():
            if math.isfinite(value):
                total, number = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value * updates, number + updates)

    def take(self) -> dict[str, float]:
        """Return the means, and start over."""
        means = {name: total / number for name, (total, number) in self._sums.items()}
        self._sums = {}
        return means


def prune(written: Path, keep: Keep) -> Path | None:
    """Remove what is older than `written`, but for what stays; return the best one where there is one.

    What is newer is not touched: it did not verify, or training was told to go on from an older one. Counted among
    those to keep, it would push out the ones that are good.
    """
    newest = [path for path in newest_first(written.parent) if path.name <= written.name]
    best = _best(newest, keep.best) if keep.best else None
    stay = {*newest[: keep.last], *_lasting(newest, keep.every), best}
    for old in newest:
        if old not in stay:
            gone = old.with_name(f".writing-removed-{old.name}")
            with contextlib.suppress(OSError):  # a leftover costs disk space; it must not cost the run
                os.rename(old, gone)
                shutil.rmtree(gone)
    return best


def _lasting(newest: Sequence[Path], every: int | None) -> list[Path]:
    """Return the oldest one from each multiple of `every` to the next; it was there first, and has stayed since."""
    first: dict[int, Path] = {}
    for path in newest:
        number = int(path.name.partition("_")[2]) // every if every else 0
        if number:
            first[number] = path
    return list(first.values())


def _best(newest: Sequence[Path], name: str) -> Path | None:
    """Return the one with the lowest score of that name, of equal ones the oldest; None where none has it."""
    found: list[tuple[float, str, Path]] = []
    for path in newest:
        with contextlib.suppress(CheckpointError):
            scores = read_state(path).scores
            found += [(scores[name], path.name, path)] if name in scores else []
    return min(found)[2] if found else None


# ------------------------------------------------------------------------------------------------------------- forecast


class Room(NamedTuple):
    """The room that checkpoints take.

    Attributes:
        each: Bytes of one.
        at_most: How many lie there at once.
        free: Bytes that are free for them, with what those take that are there already; None where nobody knows.
    """

    each: int
    at_most: int
    free: int | None

    @property
    def fits(self) -> bool:
        """Whether there is room for all of them, as far as is known."""
        return self.free is None or self.each * self.at_most <= self.free


def free_bytes(directory: Path) -> int | None:
    """Return the bytes that checkpoints in `directory` may take: those free on the disk, and those that they take.

    Quotas are not seen. None where the system does not say: a forecast must not end a run.
    """
    held = 0
    try:
        for path in newest_first(directory):
            with contextlib.suppress(OSError):
                held += sum(file.stat().st_size for file in path.iterdir())
        there = next(path for path in (directory, *directory.parents) if path.exists())
        return shutil.disk_usage(there).free + held
    except OSError:
        return None


def checkpoint_bytes(sides: Mapping[str, Captured], pools: ImagePools, picture: Sequence[int], world: int) -> int:
    """Return how large a checkpoint will be, but for its JSON: with moments, before the first step too, and full pools.

    Args:
        sides: What was captured of each, at any time.
        pools: The image pools of a rank.
        picture: Shape of a pooled image.
        world: Ranks.
    """
    total = 0
    for part in sides.values():
        weights = [(key.partition("/")[2], kind) for key, kind in part.tensors.items() if key.startswith("param/")]
        moments = {f"{moment}/{name}": kind for name, kind in weights for moment in _MOMENTS}
        total += canonical.file_bytes(part.tensors | moments)
    if pools.size:
        images = {field: ((pools.size, *picture), torch.float32) for field in pools.images}
        total += world * canonical.file_bytes(images)
    return total
