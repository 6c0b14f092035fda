"""Errors that all ranks learn of: where one cannot go on, all end with the same sentence and none waits for it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NoReturn, TypeVar

from i2i_dist.config import ConfigError
from i2i_dist.distributed import from_first_rank, gather_texts, rank_and_world

T = TypeVar("T")
# Errors of files that a person has to mend; all others, as of a full disk or a file server, may pass by themselves.
_LASTING = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP,
    errno.ENAMETOOLONG,
}  # fmt: skip


class TemporaryError(RuntimeError):
    """The run cannot start now, but perhaps in a minute: a port, a lock or a disk. The same on every rank."""


_KINDS = {kind.__name__: kind for kind in (ConfigError, TemporaryError)}


def kind_of(error: OSError) -> type[ConfigError | TemporaryError]:
    """Return what an error of a file is to the run: one of the configuration, or one that may have passed soon."""
    return ConfigError if error.errno in _LASTING else TemporaryError


def on_every_rank(make: Callable[[], T]) -> T:
    """Return what `make` does here; where it fails on any rank, all raise the same error. Collective.

    `make` itself must not wait for other ranks.

    Raises:
        ConfigError: A person has to mend it.
        TemporaryError: It may have passed by the next try.
    """
    made, problem = _attempt(make)
    for rank, text in enumerate(gather_texts(problem)):
        if text:
            _fail(text, f"rank {rank}: " if rank else "")
    return made[0]


def on_first_rank(make: Callable[[], T]) -> T | None:
    """Return what `make` does on rank 0, and None elsewhere; where it fails all raise as `on_every_rank` does."""
    made, problem = _attempt(make) if rank_and_world()[0] == 0 else ([], "")
    if problem := from_first_rank(problem):
        _fail(problem)
    return made[0] if made else None


def _attempt(make: Callable[[], T]) -> tuple[list[T], str]:
    """Return what was made, or the kind and the text of what is wrong."""
    try:
        return [make()], ""
    except ValueError as error:
        return [], f"{ConfigError.__name__}:{error}"
    except TemporaryError as error:
        return [], f"{TemporaryError.__name__}:{error}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return [], f"{kind_of(error).__name__}:{where}{error.strerror or error}"


def _fail(problem: str, where: str = "") -> NoReturn:
    kind, _, text = problem.partition(":")
    raise _KINDS[kind](where + text)
