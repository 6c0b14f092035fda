"""Writing a checkpoint: rank 0 makes its files, every rank fills in its share, and rank 0 publishes it in one step.

It is written as `.writing-...` beside its place, flushed to the disk, and renamed; whatever dies on the way leaves the
checkpoints before it as they were. Nothing here talks to other ranks or to a GPU, so that it can run beside training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from i2i_dist import __version__, canonical, retention
from i2i_dist.checkpoint import FORMAT, State, pool_name, sha256
from i2i_dist.engine_state import Captured, Piece
from i2i_dist.retention import Keep

_log = logging.getLogger("i2i_dist.checkpoint")


def create(writing: Path, sides: Mapping[str, Captured]) -> None:
    """Make the directory and the files that all ranks write into; remove what earlier writers have left."""
    writing.parent.mkdir(parents=True, exist_ok=True)
    for leftover in writing.parent.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()
    for side, part in sides.items():
        canonical.create(writing / f"{side}.safetensors", part.tensors)


def write_share(writing: Path, sides: Mapping[str, Captured], pool: Mapping[str, Tensor] | None, rank: int) -> None:
    """Write what this rank holds, down to the disk.

    Args:
        writing: The directory that `create` made.
        sides: What this rank holds of each side, in CPU memory.
        pool: Its image pool, field -> images [K, C, H, W] in CPU memory; None where there are no pools.
        rank: Which rank this is.
    """
    for side, part in sides.items():
        canonical.write_pieces(writing / f"{side}.safetensors", part.tensors, part.pieces)
    if pool is not None:
        images = {field: (tuple(tensor.shape), tensor.dtype) for field, tensor in pool.items()}
        canonical.create(writing / pool_name(rank), images)
        pieces = {field: Piece(0, tensor.view(-1)) for field, tensor in pool.items()}
        canonical.write_pieces(writing / pool_name(rank), images, pieces)


def publish(writing: Path, target: Path, state: State, sides: Mapping[str, Captured], keep: Keep) -> None:
    """Give the checkpoint its name once all ranks have written; then remove those that need not stay."""
    numbers = {side: part.scalars for side, part in sides.items()}
    document = state._asdict() | {"optimizer": numbers, "written_by": __version__}
    _write_text(writing / "state.json", json.dumps(document, indent=1))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(writing.iterdir())}
    _write_text(writing / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
    _flush(writing)
    replaced = target.with_name(f".writing-replaced-{target.name}")
    if target.exists():  # it did not verify, or training would have gone on from it
        os.rename(target, replaced)
    try:
        os.rename(writing, target)
    except OSError:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    try:
        _flush(target.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)
    _name("latest", target)
    best = retention.prune(target, keep)
    if best is not None:
        _name("best", best)
    else:
        with contextlib.suppress(OSError):
            target.with_name("best").unlink(missing_ok=True)


def _name(word: str, target: Path) -> None:
    """Write the name of a checkpoint into a file, for people and scripts; nothing here reads it to decide anything."""
    temporary = target.with_name(f".{word}")
    try:
        _write_text(temporary, target.name + "\n")
        os.replace(temporary, target.with_name(word))
    except OSError as error:
        _log.warning("%s does not name %s: %s.", target.with_name(word), target.name, error.strerror or error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
