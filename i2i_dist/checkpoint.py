"""Checkpoints: what one is, which one to go on from, and how a run is set to what one holds.

A checkpoint is a directory `images_000012800` with

    generator.safetensors, discriminator.safetensors   each side in full shapes, whatever the ranks and ZeRO stages were
    pool_rank_0000.safetensors, ...                    the image pool of each rank, where the method has one
    state.json                                         images seen, updates, configuration, dataset, optimizer numbers
    manifest.json                                      format version; size and sha256 of all of the above

`publishing.py` writes it. Nothing in it is pickled, and before anything is believed every file is verified.

The format has a version. Version 2 added `scores` to state.json; a checkpoint of an older one is read by way of
`_MIGRATIONS`, and keeps its files as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from i2i_dist import __version__, engine_state
from i2i_dist.canonical import CanonicalFile
from i2i_dist.distributed import barrier, rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.method import SIDES, Side
from i2i_dist.pool import ImagePools
from i2i_dist.step import Sides

FORMAT = 2
_NAME = re.compile(r"images_\d{12}")
_FILE = re.compile(rf"state\.json|({'|'.join(SIDES)})\.safetensors|pool_rank_\d{{4,}}\.safetensors")
_NEEDED = ("state.json", *(f"{side}.safetensors" for side in SIDES))
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
        scores: Mean of each loss and gauge over the records since the checkpoint before, where it was finite.
    """

    images_seen: int
    updates: int
    world: int
    config: dict[str, Any]
    dataset: dict[str, str]
    scores: dict[str, float]


class _Numbers(BaseModel):
    generator: dict[str, float]
    discriminator: dict[str, float]


class _Document(BaseModel):
    """What state.json holds, of which kinds: what is read without `verify` may have any bit flipped."""

    model_config = ConfigDict(strict=True)

    images_seen: int
    updates: int
    world: int
    config: dict[str, Any]
    dataset: dict[str, str]
    scores: dict[str, float]
    optimizer: _Numbers


def directory_name(images_seen: int) -> str:
    """Return the name of the checkpoint at `images_seen`; names sort as the numbers do."""
    return f"images_{images_seen:012d}"


def pool_name(rank: int) -> str:
    """Return the name of the file with a rank's image pool."""
    return f"pool_rank_{rank:04d}.safetensors"


# -------------------------------------------------------------------------------------------------------------- finding


def newest_verified(directory: Path) -> tuple[Path | None, list[Skipped]]:
    """Return the newest checkpoint of a run that verifies, and those newer ones that do not."""
    skipped = []
    for path in newest_first(directory):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            return path, skipped
    return None, skipped


def newest_first(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, verified or not, without what people have copied under other names."""
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
    """Check every file of a checkpoint against its manifest, and that each is of its kind.

    Raises:
        CheckpointError: A file is missing, has another size, or other content; one is there that is no part of a
            checkpoint or is not in the format that it should be; or the checkpoint's format is another.
    """
    manifest = _read_json(path / "manifest.json")
    _check_format(path, manifest)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files.keys() >= set(_NEEDED):
        raise CheckpointError(f"manifest.json does not list its files: {', '.join(_NEEDED)}")
    for name, expected in files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"manifest.json lists {name!r}, which is no file of a checkpoint")
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise CheckpointError(f"manifest.json does not list the size and sha256 of {name}")
        try:
            _verify_file(path / name, expected)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
    read_state(path)


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    number = manifest.get("format")
    if type(number) is int and 1 <= number <= FORMAT:
        return
    try:
        writer = f", written by version {_read_json(path / 'state.json')['written_by']}"
    except (CheckpointError, KeyError):
        writer = ""
    raise CheckpointError(
        f"its format is {number!r}{writer}, and this version, {__version__}, reads formats 1 to {FORMAT}; go on with "
        "the version that wrote it or a newer one, or from an older checkpoint"
    )


def _verify_file(file: Path, expected: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.name} is missing")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{file.name} has {size} bytes, and had {expected['bytes']} when it was written")
    if sha256(file) != expected["sha256"]:
        raise CheckpointError(f"{file.name} has changed since it was written (its sha256 differs)")
    if file.suffix == ".safetensors":  # a good sum says who wrote the file, not that it is safe to read
        try:
            with safetensors.safe_open(file, "numpy"):
                pass
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{file.name} is no safetensors file, and is not read: {error}") from None


def sha256(path: Path) -> str:
    """Return the sum of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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


def _from_1(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"scores": {}}


# Format -> what makes the state.json of the next one out of it.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def _read_document(path: Path) -> dict[str, Any]:
    """Return state.json as this version's format has it; neither file needs to have been verified."""
    manifest = _read_json(path / "manifest.json")
    _check_format(path, manifest)
    document = _read_json(path / "state.json")
    for number in range(manifest["format"], FORMAT):
        document = _MIGRATIONS[number](document)
    missing = [key for key in (*State._fields, "optimizer") if key not in document]
    if missing:
        raise CheckpointError(f"state.json does not say {', '.join(missing)}")
    try:
        _Document.model_validate(document)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"state.json does not hold what it should at {place}") from None
    return document


def read_state(path: Path) -> State:
    """Return the state of a checkpoint, verified or not.

    Raises:
        CheckpointError: It does not hold what it should.
    """
    document = _read_document(path)
    return State(**{field: document[field] for field in State._fields})


def side_file(path: Path, side: str) -> CanonicalFile:
    """Open one side of a checkpoint for reading."""
    numbers: dict[str, float] = _read_document(path)["optimizer"][side]
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
    state, pool = read_state(path), path / pool_name(rank)
    if pools.size and state.world == world and pool.is_file():
        pools.restore(safetensors.torch.load_file(pool), device)
    elif pools.size:
        pools.restore({}, device)
        if rank == 0:
            reason = f"by {state.world} ranks and there are {world} now" if state.world != world else "without them"
            _log.warning("The checkpoint was written %s: the image pools start empty.", reason)
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
