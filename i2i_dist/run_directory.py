"""A run's directory: which one, who may write into it, and where training goes on from."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from i2i_dist import checkpoint
from i2i_dist.agreement import TemporaryError, kind_of
from i2i_dist.checkpoint import CheckpointError, State
from i2i_dist.config import ConfigError
from i2i_dist.distributed import from_first_rank, gather_texts

_SEEN_SECONDS = 5.0  # longer than NFS clients believe what they know of a file (acregmin: 3)

_HELD = {errno.EAGAIN, errno.EACCES}  # what a lock answers that another process holds
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system without locks answers

_WENT_BACK = ".went_back"  # of a run's directory: the checkpoint that its training went on from, and --resume

_log = logging.getLogger("i2i_dist.run")


def choose(given: str | None, config_path: Path, fresh: bool) -> Path:
    """Return the run directory: `--run`, or `runs/` and the configuration's name; with `fresh` the next free one."""
    base = Path(given) if given else Path("runs") / config_path.stem
    if not fresh or not base.exists():
        return base
    number = 2
    while base.with_name(f"{base.name}-{number}").exists():
        number += 1
    return base.with_name(f"{base.name}-{number}")


def lock(directory: Path) -> IO[str]:
    """Make the directory and lock it until the returned file is closed or the process ends, however it ends.

    Raises:
        ConfigError: The directory cannot be written, or its file system has no locks.
        TemporaryError: Another run holds the lock, perhaps one that is about to end; or the disk fails or is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise kind_of(error)(f"--run {directory}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            raise _not_locked(directory, file, error) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    os.fsync(file.fileno())  # on a network file system other machines see it only then
    # The lock is the open file's: reading processes that outlive a killed trainer by seconds would go on holding it.
    os.register_at_fork(after_in_child=file.close)
    return file


def _not_locked(directory: Path, file: IO[str], error: OSError) -> ConfigError | TemporaryError:
    """Return what to say of a lock that was not given."""
    if error.errno in _HELD:
        file.seek(0)
        holder = file.read().strip() or "another process"
        return TemporaryError(
            f"--run {directory} is in use by {holder}; wait for it, stop it, or give this run another --run"
        )
    if error.errno in _NO_LOCKS:
        return ConfigError(
            f"--run {directory}: this file system has no locks (flock: {error.strerror}), without which two runs could "
            "write into one directory; have it mounted with them (Lustre: -o flock; NFS 3: a lock daemon on both "
            "sides), or give this run a --run on another one"
        )
    return kind_of(error)(f"--run {directory}: cannot be locked: {error.strerror}")


def _holder(directory: Path) -> str:
    try:
        return (directory / ".lock").read_text(encoding="utf-8")
    except OSError:
        return ""


def check_shared(directory: Path) -> None:
    """Make sure that all ranks see the directory that rank 0 has locked. Collective.

    A network file system may go on showing what was there before for a few seconds: ranks look until they see the same.

    Raises:
        ConfigError: A rank sees another one, or none.
    """

    written = from_first_rank(_holder(directory))
    begun = time.monotonic()
    while (seen := _holder(directory)) != written and time.monotonic() - begun < _SEEN_SECONDS:
        time.sleep(0.1)
    for rank, text in enumerate(gather_texts(seen)):
        if text != written:
            raise ConfigError(
                f"--run {directory}: rank {rank} does not see what rank 0 has written there; the run's directory must "
                "be on a file system that all machines share"
            )


def write_config(directory: Path, text: str) -> None:
    """Save the resolved configuration."""
    temporary = directory / ".config.yaml"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, directory / "config.yaml")


def asked_for(directory: Path, resume: str, started_again: bool) -> str:
    """Return what `--resume` means now: a restart must not go back once more, and lose what was trained since.

    Args:
        directory: The run directory, of which this process holds the lock.
        resume: "auto" or the path of a checkpoint.
        started_again: Whether the same command was started before.
    """
    note = directory / _WENT_BACK
    text = note.read_text(encoding="utf-8") if note.exists() else ""
    begun_from, _, noted = text.partition(" ")
    if not started_again or noted != resume:
        note.unlink(missing_ok=True)
        return resume
    if not any(path.name > begun_from for path in (directory / "checkpoints").glob("images_*")):
        return resume
    _log.info("The run has gone on since it went back with --resume %s: this restart takes its newest.", resume)
    return "auto"


def note_going_back(directory: Path, resume: str, images_seen: int) -> None:
    """Write down that the run has gone on from the checkpoint that `--resume` names, for `asked_for`."""
    name = checkpoint.directory_name(images_seen)
    (directory / _WENT_BACK).write_text(f"{name} {resume}", encoding="utf-8")


def find_checkpoint(directory: Path, resume: str) -> Path | None:
    """Return the checkpoint to go on from, or None to start; says in the log what was passed over and why.

    Args:
        directory: The run directory.
        resume: "auto" for the newest checkpoint that verifies, or the path of a checkpoint.

    Raises:
        ConfigError: There is no checkpoint of the name asked for.
        CheckpointError: The checkpoint asked for does not verify, or none of several does.
    """
    if resume != "auto":
        path = Path(resume)
        if not (path / "manifest.json").exists():
            there = sorted(str(manifest.parent) for manifest in directory.glob("checkpoints/images_*/manifest.json"))
            raise ConfigError(f"--resume {resume}: not a checkpoint; this run's are: {', '.join(there) or 'none'}")
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            raise CheckpointError(f"--resume {resume}: {error}") from None
        return path
    found, skipped = checkpoint.newest_verified(directory / "checkpoints")
    for path, reason in skipped:
        _log.warning("Skipped checkpoint %s: %s.", path, reason)
    if found is None and skipped:
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {directory / 'checkpoints'} verifies; restore one of them, or "
            "start over in another directory: a new --run DIR, or --fresh where nothing starts the run again"
        )
    if found is not None:
        _check_hint(found)
    return found


def set_aside(directory: Path, images_seen: int, resumed_from: Path | None) -> None:
    """Move the checkpoints that this training has left behind, going back or past broken ones, to `set_aside/`.

    Left where they are, they would count as the newest: the next resume would take them up again, and the number of
    checkpoints to keep would be used up by them.
    """
    checkpoints = directory / "checkpoints"
    for path in sorted(checkpoints.glob("images_*")):
        own = resumed_from is not None and path.resolve() == resumed_from.resolve()
        if own or not path.name[len("images_") :].isdigit() or path.name < checkpoint.directory_name(images_seen):
            continue
        place, number = checkpoints / "set_aside" / path.name, 2
        while place.exists():
            place, number = place.with_name(f"{path.name}-{number}"), number + 1
        place.parent.mkdir(exist_ok=True)
        os.rename(path, place)
        _log.warning("Training goes on from before %s: moved it to %s.", path.name, place)


def _check_hint(found: Path) -> None:
    """`latest` is there for people and scripts; resuming never depends on it, but a wrong one is worth a word."""
    try:
        named = (found.parent / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        named = ""
    if named != found.name:
        _log.warning(
            "%s names '%s'; the newest checkpoint that verifies is %s.", found.parent / "latest", named, found.name
        )


def check_same_run(
    path: Path, config: Mapping[str, Any], dataset: Mapping[str, str], architecture: Sequence[str]
) -> State:
    """Return a checkpoint's state if this run may go on from it; differences that may be are logged.

    Raises:
        ConfigError: A key of the method that is named in `architecture`, or the data set, is another; or the checkpoint
            holds weights of the official code, which no run trained.
    """
    state = checkpoint.read_state(path)
    if "converted" in state.config:
        raise ConfigError(
            f"{path} was made by launchers/convert.py: it holds weights to translate with, and no optimizer and no "
            "data set to go on with; train into another directory"
        )
    saved_method, method = state.config["method"], config["method"]
    refused = [f"method.{line}" for line in checkpoint.differences(saved_method, method, architecture)]
    for domain in sorted(dataset.keys() | state.dataset.keys()):
        if state.dataset.get(domain) != dataset.get(domain):
            refused.append(f"data: the images of domain {domain} are not those that the run was trained on")
    if refused:
        lines = "\n".join(f"  {line}" for line in refused)
        raise ConfigError(
            f"{path} cannot be continued with this configuration:\n{lines}\n"
            "go back to what it was trained with, or start over beside it with --fresh"
        )
    for line in checkpoint.differences(state.config, config, list(config)):
        _log.info("Changed since the checkpoint: %s.", line)
    return state
