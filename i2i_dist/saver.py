"""Saving beside training: what a checkpoint holds is copied between two updates, and written while the next ones run.

Training stands still for the copy to host memory alone. The disk is left to a thread of each rank, which neither talks
to other ranks nor calls CUDA: every rank has a few flags that all ranks reduce with those of each update, and what they
come to moves all ranks on together from phase to phase. First rank 0 makes the files, then every rank writes its share,
then rank 0 publishes.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from i2i_dist import engine_state, publishing, stacks
from i2i_dist.checkpoint import State, directory_name
from i2i_dist.distributed import any_rank, from_first_rank, gather_texts, rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engine_state import Captured, Piece
from i2i_dist.method import SIDES
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep
from i2i_dist.step import Sides
from i2i_dist.telemetry.record import CHECKPOINT_FAILURES

NOT_FINITE = "not finite"  # a kind of failure that is no disk's
_POLL_SECONDS = 0.02
_LEAVING_SECONDS = 5.0  # where a rank has died all others end within 15, whatever the disk does
_SLOW_SECONDS = 300.0  # a checkpoint that takes longer beside training is worth a word
_REMINDER_SECONDS = 60.0  # between two words where the run waits for one

_log = logging.getLogger("i2i_dist.saver")


class _NotFiniteError(ValueError):
    """What a checkpoint would hold is not finite."""


class Failure(NamedTuple):
    """Why a checkpoint is not on the disk: one of `CHECKPOINT_FAILURES` or `NOT_FINITE`, and which rank met what."""

    kind: str
    reason: str


class Outcome(NamedTuple):
    """What came of a save.

    Attributes:
        images_seen: Of the checkpoint.
        failure: None where it was published.
        seconds: From its beginning until it was published or given up.
        paused: For how many of them training stood still.
    """

    images_seen: int
    failure: Failure | None
    seconds: float
    paused: float


class _Save(NamedTuple):
    images_seen: int
    begun: float
    paused: float


def capture(sides: Sides, ema: Ema) -> dict[str, Captured]:
    """Return this rank's share of both sides, averages with the generator's; nothing is copied."""
    return {side: engine_state.capture(sides[side], ema.averages if side == "generator" else {}) for side in SIDES}


def write(
    directory: Path, state: State, captured: Mapping[str, Captured], pools: ImagePools, keep: Keep
) -> Failure | None:
    """Write a checkpoint of what lies in CPU memory, and wait until it is published. Collective.

    Returns:
        None, or why it is not on the disk; the checkpoints before are then untouched.
    """
    saver = Saver(directory, keep, torch.device("cpu"))
    saver.begin(state, captured, pools, time.monotonic())
    outcome = saver.finish()
    assert outcome is not None
    return outcome.failure


class Saver:
    """Writes the checkpoints of a run, one at a time. All ranks call its methods alike, between updates."""

    def __init__(self, directory: Path, keep: Keep, device: torch.device, patience: float = math.inf) -> None:
        """Prepare to save.

        Args:
            directory: Of the checkpoints.
            keep: Which of them stay.
            device: Of the ranks' collectives.
            patience: For how many seconds `finish` waits for a disk.
        """
        self._directory, self._keep, self._device, self._patience = directory, keep, device, patience
        self._host: dict[str, Tensor] = {}  # where copies go; kept, since memory is slow the first time
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._phases: list[Callable[[], None] | None] = []  # that are still to come; None where this rank has no work
        self._error: Exception | None = None  # what this rank has met and not told yet
        self._ended = 0.0
        self._failure: Failure | None = None
        self._hung = False  # `finish` has given up: a thread of some rank may still write from the copies
        self._reminder = 0.0  # `time.monotonic` at which this rank says that it is slow

    @property
    def busy(self) -> bool:
        """Whether no save can begin, since one is under way or never ended; the same on all ranks."""
        return self._save is not None or self._hung

    @property
    def flags(self) -> tuple[bool, bool]:
        """Whether this rank's thread is at work, and whether it has failed: what `advance` takes, once reduced."""
        working = self._thread is not None and self._thread.is_alive()
        return working, not working and self._error is not None

    def begin(self, state: State, captured: Mapping[str, Captured], pools: ImagePools, begun: float) -> None:
        """Copy what a checkpoint holds, and start to write it; training may go on when this returns. Collective.

        Args:
            state: What the checkpoint says of itself.
            captured: This rank's share of each side.
            pools: This rank's image pools.
            begun: `time.monotonic` when training was stopped for it.
        """
        assert not self.busy, "one save at a time"
        rank, _ = rank_and_world()
        name = f".writing-{directory_name(state.images_seen)}-{uuid.uuid4().hex[:8]}"
        writing = self._directory / from_first_rank(name)
        sides, pool = self._copied(captured, pools)
        create = partial(publishing.create, writing, sides)
        share = partial(_write_share, writing, sides, pool, rank)
        close = partial(self._close, writing, state, sides)
        self._phases = [create, share, close] if rank == 0 else [None, share, None]
        self._failure = None
        self._start(self._phases.pop(0))
        self._save = _Save(state.images_seen, begun, time.monotonic() - begun)
        self._reminder = time.monotonic() + _SLOW_SECONDS

    def _copied(
        self, captured: Mapping[str, Captured], pools: ImagePools
    ) -> tuple[dict[str, Captured], dict[str, Tensor] | None]:
        sides = {}
        for side, part in captured.items():
            pieces = {
                key: Piece(piece.start, self._copy(f"{side}/{key}", piece.values)) for key, piece in part.pieces.items()
            }
            sides[side] = part._replace(pieces=pieces)
        pool = {field: self._copy(f"pool/{field}", images) for field, images in pools.state().items()}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return sides, pool if pools.size else None

    def _copy(self, key: str, values: Tensor) -> Tensor:
        """Copy to host memory; from a GPU it is done when the stream has come as far."""
        host = self._host.get(key)
        if host is None or host.shape != values.shape or host.dtype != values.dtype:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._host[key] = host
        return host.copy_(values.detach(), non_blocking=values.is_cuda)

    def _start(self, work: Callable[[], None] | None) -> None:
        """Have this rank's thread do its part of a phase, where it has one."""
        if work is None:
            return

        def attempt() -> None:
            try:
                work()
            except Exception as error:  # a full disk, or a mistake, which the main thread raises
                self._error = error
            self._ended = time.monotonic()

        self._thread = threading.Thread(target=attempt, name="i2i-saver", daemon=True)
        self._thread.start()

    def advance(self, working: bool, failed: bool) -> Outcome | None:
        """Move the save that is under way on; return what came of it when it is over.

        Args:
            working: Whether the thread of any rank is at work, by their `flags`.
            failed: Whether any rank has failed.
        """
        save = self._save
        if save is None:
            return None
        if working:
            self._remind(save, math.inf)
            return None
        if self._error is not None and not isinstance(self._error, (OSError, _NotFiniteError)):
            raise self._error
        failure = _agree_on_failure(self._error) if failed else None
        self._error = None
        self._failure = self._failure or failure
        if self._failure is not None:
            del self._phases[:-1]  # the last one removes what was written
        if self._phases:
            self._start(self._phases.pop(0))
            return None
        self._save, self._thread = None, None
        return Outcome(save.images_seen, self._failure, self._ended - save.begun, save.paused)

    def _remind(self, save: _Save, again: float) -> None:
        """Say that this rank's thread is slow, where it is time to, and again after so many seconds."""
        now = time.monotonic()
        if self.flags[0] and now >= self._reminder:
            seen, rank = save.images_seen, rank_and_world()[0]
            told = (
                "The checkpoint at image %d waits for the disk of rank %d, for %.0f s so far: look whether %s answers."
            )
            _log.warning(told, seen, rank, now - save.begun, self._directory)
            self._reminder = now + again

    def _close(self, writing: Path, state: State, sides: Mapping[str, Captured]) -> None:
        """Publish, or remove what was written."""
        try:
            if self._failure is None:
                target = self._directory / directory_name(state.images_seen)
                publishing.publish(writing, target, state, sides, self._keep)
        finally:
            shutil.rmtree(writing, ignore_errors=True)

    def finish(self) -> Outcome | None:
        """Wait until nothing is under way; return what came of it, or None where nothing was. Collective.

        The ranks exchange their flags all along: none waits for a slow disk of another for longer than a moment. After
        the saver's patience the save counts as failed, and none can begin any more.
        """
        outcome, begun = None, time.monotonic()
        self._reminder = begun + _REMINDER_SECONDS
        while (save := self._save) is not None:
            stacks.alive()  # a slow disk is no hang
            if self._thread is not None:
                self._thread.join(_POLL_SECONDS)
            mine = self.flags
            late = time.monotonic() - begun > self._patience
            working, failed, given_up = any_rank(torch.tensor([*mine, late], device=self._device))
            if working and given_up:
                return self._give_up(save, mine[0])
            self._remind(save, _REMINDER_SECONDS)
            outcome = self.advance(working, failed)
        return outcome

    def _give_up(self, save: _Save, mine: bool) -> Outcome:
        """End a save whose thread hangs on some rank, `mine` where on this one. Collective."""
        error = TimeoutError(f"the disk has not answered for {self._patience:.0f} s") if mine else None
        failure = _agree_on_failure(error)
        self._save, self._hung = None, True
        return Outcome(save.images_seen, failure, time.monotonic() - save.begun, save.paused)

    def leave(self) -> None:
        """Let a checkpoint that all ranks have written be published, on rank 0, where the run ends for an error.

        The other ranks may be gone: a share that is still being written will never be part of one, so nobody waits.
        """
        if self._save is not None and not self._phases and self._thread is not None:
            self._thread.join(_LEAVING_SECONDS)


def _write_share(writing: Path, sides: Mapping[str, Captured], pool: Mapping[str, Tensor] | None, rank: int) -> None:
    """Write what is finite. It is looked at here, in the copies: on a CPU that takes longer than to make them."""
    for side, part in sides.items():
        for key, (_, values) in part.pieces.items():
            if values.is_floating_point() and values.numel() and not _finite(values):
                raise _NotFiniteError(f"{side} {key}")
    publishing.write_share(writing, sides, pool, rank)


def _finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)  # of which NaN makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _agree_on_failure(error: Exception | None) -> Failure:
    """Tell all ranks of the first failure of any. Collective."""
    (rank, _), mine = rank_and_world(), ["", ""]
    if isinstance(error, OSError):
        kind = errno.errorcode.get(error.errno or 0, "").lower()
        mine = [kind if kind in CHECKPOINT_FAILURES else "other", f"rank {rank}: {error.strerror or error}"]
    elif error is not None:
        mine = [NOT_FINITE, f"rank {rank}: {error}"]
    found = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    return next(Failure(*one) for one in found if one[0])
