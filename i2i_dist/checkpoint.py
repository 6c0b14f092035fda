"""Checkpoints: written by all ranks, published in one atomic step, verified before anything is believed.

A checkpoint is a directory `images_000012800` with

    generator.safetensors, discriminator.safetensors   each side in full shapes, whatever the ranks and ZeRO stages were
    pool_rank_0000.safetensors, ...                    the image pool of each rank, where the method has one
    state.json                                         images seen, updates, configuration, dataset, optimizer numbers
    manifest.json                                      format version; size and sha256 of all of the above

It is written as `.writing-...` beside its place, flushed to the disk, and renamed; whatever dies on the way leaves the
checkpoints before it as they were. Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import nn

from i2i_dist import canonical, engine_state
from i2i_dist.canonical import CanonicalFile
from i2i_dist.distributed import barrier, from_first_rank, gather_texts, rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engine_state import Captured
from i2i_dist.method import SIDES, Side
from i2i_dist.pool import ImagePools
from i2i_dist.step import Sides

FORMAT = 1
_NAME = re.compile(r"images_\d{12}")
_log = logging.getLogger("i2i_dist.checkpoint")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which one and why."""


class Skipped(NamedTuple):
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


class State(NamedTuple):
    """What `state.json` says, beside the optimizer's numbers.

    Attributes:
        images_seen: The clock of everything.
        updates: Updates attempted so far.
        world: Ranks that wrote the checkpoint.
        config: The whole resolved configuration, the method's section included. Where the weights were converted from
            the official files, the method's section, and a section `converted` that says what they held.
        dataset: Domain -> fingerprint.
    """

    images_seen: int
    updates: int
    world: int
    config: dict[str, Any]
    dataset: dict[str, str]


def directory_name(images_seen: int) -> str:
    """Return the name of the checkpoint at `images_seen`; names sort as the numbers do."""
    return f"images_{images_seen:012d}"


# --------------------------------------------------------------------------------------------------------------- saving


def save(directory: Path, state: State, sides: Sides, ema: Ema, pools: ImagePools, keep: int) -> str | None:
    """Write and publish a checkpoint, and of it and those before it remove all but the newest `keep`. Collective.

    Returns:
        None, or the reason why it is not safely on the disk; the checkpoints before are then untouched and training can
        go on.
    """
    captured: dict[str, Captured] = {
        side: engine_state.capture(sides[side], ema.averages if side == "generator" else {}) for side in SIDES
    }  # fmt: skip
    return write(directory, state, captured, pools, keep)


def write(directory: Path, state: State, captured: Mapping[str, Captured], pools: ImagePools, keep: int) -> str | None:
    """Do what `save` does, with the state of each side as it was captured, from an engine or a plain module."""
    rank, _ = rank_and_world()
    target = directory / directory_name(state.images_seen)
    writing = directory / from_first_rank(f".writing-{target.name}-{uuid.uuid4().hex[:8]}")
    phases: list[Callable[[], None]] = [
        lambda: _create(writing, captured) if rank == 0 else None,
        lambda: _write_share(writing, captured, pools),
        lambda: _publish(writing, target, state, captured) if rank == 0 else None,
    ]
    for phase in phases:
        reason = _on_all_ranks(phase)
        if reason:
            if rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            return reason
    if rank == 0:
        _name_latest(target)
        _prune(target, keep)
    return None


def _on_all_ranks(phase: Callable[[], None]) -> str | None:
    """Run a phase of the save; every rank learns of the first error on any of them, and none waits for the others."""
    reason = ""
    try:
        phase()
    except OSError as error:
        reason = f"rank {rank_and_world()[0]}: {error.strerror or error}"
    return next((text for text in gather_texts(reason) if text), None)


def _create(writing: Path, captured: Mapping[str, Captured]) -> None:
    writing.parent.mkdir(parents=True, exist_ok=True)
    for leftover in writing.parent.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()
    for side, part in captured.items():
        canonical.create(writing / f"{side}.safetensors", part.tensors)


def _write_share(writing: Path, captured: Mapping[str, Captured], pools: ImagePools) -> None:
    for side, part in captured.items():
        canonical.write_pieces(writing / f"{side}.safetensors", part.tensors, part.pieces)
    if pools.size:
        path = writing / f"pool_rank_{rank_and_world()[0]:04d}.safetensors"
        path.write_bytes(safetensors.torch.save(pools.state()))
        _flush(path)


def _publish(writing: Path, target: Path, state: State, captured: Mapping[str, Captured]) -> None:
    document = state._asdict() | {"optimizer": {side: part.scalars for side, part in captured.items()}}
    _write_text(writing / "state.json", json.dumps(document, indent=1))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(writing.iterdir())}
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


def _name_latest(target: Path) -> None:
    """Write the name of the newest checkpoint for people and scripts; nothing here reads it to decide anything."""
    temporary = target.with_name(".latest")
    try:
        _write_text(temporary, target.name + "\n")
        os.replace(temporary, target.with_name("latest"))
    except OSError as error:
        _log.warning("%s does not name %s: %s.", target.with_name("latest"), target.name, error.strerror or error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _prune(written: Path, keep: int) -> None:
    """Remove what is older than `written` beyond the newest `keep`.

    What is newer stays: it did not verify, or training was told to go on from an older one. Counted among those to
    keep, it would push out the ones that are good.
    """
    for old in [path for path in _newest_first(written.parent) if path.name <= written.name][keep:]:
        gone = old.with_name(f".writing-removed-{old.name}")
        with contextlib.suppress(OSError):  # a leftover costs disk space; it must not cost the run
            os.rename(old, gone)
            shutil.rmtree(gone)


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- finding


def newest_verified(directory: Path) -> tuple[Path | None, list[Skipped]]:
    """Return the newest checkpoint of a run that verifies, and those newer ones that do not."""
    skipped = []
    for path in _newest_first(directory):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            return path, skipped
    return None, skipped


def _newest_first(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`; what people have copied under names of their own is left alone."""
    found = directory.glob("images_*") if directory.is_dir() else ()
    ours = [path for path in found if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(ours, key=lambda path: path.name, reverse=True)


def find(path: Path) -> Path:
    """Return the checkpoint that a person means by `path`, verified.

    Args:
        path: A checkpoint; or a run directory, or its folder of checkpoints, for the newest one that verifies.

    Raises:
        CheckpointError: There is no checkpoint at `path`, or it does not verify.
    """
    if (path / "manifest.json").exists():
        try:
            verify(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return path
    inside = path / "checkpoints"
    found, skipped = newest_verified(inside if inside.is_dir() else path)
    if found is None:
        reasons = "".join(f"; {bad.path.name}: {bad.reason}" for bad in skipped)
        raise CheckpointError(f"{path} is no checkpoint and no run directory with one that verifies{reasons}")
    return found


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: A file is missing, has another size, or other content; or the format is another.
    """
    manifest = _read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"its format is {manifest.get('format')!r}, and this version reads format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or "state.json" not in files:
        raise CheckpointError("manifest.json does not list its files")
    for name, expected in files.items():
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise CheckpointError(f"manifest.json does not list the size and sha256 of {name}")
        try:
            _verify_file(path / name, expected)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None


def _verify_file(file: Path, expected: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.name} is missing")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{file.name} has {size} bytes, and had {expected['bytes']} when it was written")
    if _sha256(file) != expected["sha256"]:
        raise CheckpointError(f"{file.name} has changed since it was written (its sha256 differs)")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key given twice: one flipped bit makes rank_0000 of rank_0001, and one of the two would go unchecked."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} does not hold what it should")
    return document


def read_state(path: Path) -> State:
    """Return the state of a checkpoint that `verify` accepts."""
    document = _read_json(path / "state.json")
    return State(**{field: document[field] for field in State._fields})


def side_file(path: Path, side: str) -> CanonicalFile:
    """Open one side of a checkpoint for reading."""
    numbers: dict[str, float] = _read_json(path / "state.json")["optimizer"][side]
    return CanonicalFile(path / f"{side}.safetensors", numbers)


# ------------------------------------------------------------------------------------------------------------ restoring


def restore(path: Path, sides: Sides, ema: Ema, pools: ImagePools, device: torch.device) -> State:
    """Set sides, average and pools to what a verified checkpoint holds. Collective.

    At another number of ranks the pools start empty, since each belonged to a rank; everything else is the same.
    """
    rank, world = rank_and_world()
    for side in SIDES:
        source = side_file(path, side)
        engine_state.restore(sides[side], source)
        if side == "generator":
            ema.restore(source)
    state = read_state(path)
    if pools.size and state.world == world:
        pools.restore(safetensors.torch.load_file(path / f"pool_rank_{rank:04d}.safetensors"), device)
    elif pools.size:
        pools.restore({}, device)
        if rank == 0:
            _log.warning(
                "The checkpoint was written by %d ranks and there are %d now: the image pools start empty.",
                state.world,
                world,
            )
    barrier()
    return state


@torch.no_grad()
def fill(path: Path, side: Side, module: nn.Module, averaged: bool) -> None:
    """Set a side that no engine holds, built with the checkpoint's configuration, to what a verified checkpoint holds.

    With `averaged` it takes the averages, where the checkpoint has them, in place of the weights.
    """
    source = side_file(path, side)
    shapes = source.shapes()
    for name, parameter in module.named_parameters():
        kind = "ema" if averaged and f"ema/{name}" in shapes else "param"
        parameter.copy_(source.whole(f"{kind}/{name}"))
    for name, buffer in engine_state.persistent_buffers(module).items():
        buffer.copy_(source.whole(f"buffer/{name}"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], sections: Sequence[str]) -> list[str]:
    """Name every key of `sections` in which two resolved configurations differ, with both values."""
    lines = []
    for section in sections:
        before, after = old.get(section), new.get(section)
        if isinstance(before, dict) and isinstance(after, dict):
            keys = [*before, *(key for key in after if key not in before)]
            inner = differences(before, after, keys)
            lines += [f"{section}.{line}" for line in inner]
        elif before != after:
            lines.append(f"{section}: {before!r} -> {after!r}")
    return lines
