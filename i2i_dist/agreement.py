"""Errors that all ranks learn of: where one cannot go on, all end with the same sentence and none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from i2i_dist.config import ConfigError
from i2i_dist.distributed import from_first_rank, gather_texts, rank_and_world

T = TypeVar("T")


def on_every_rank(make: Callable[[], T]) -> T:
    """Return what `make` does here; where it fails on any rank, all raise the same `ConfigError`. Collective.

    `make` itself must not wait for other ranks.
    """
    made, problem = _attempt(make)
    for rank, text in enumerate(gather_texts(problem)):
        if text:
            raise ConfigError(f"rank {rank}: {text}" if rank else text)
    return made[0]


def on_first_rank(make: Callable[[], T]) -> T | None:
    """Return what `make` does on rank 0, and None elsewhere; where it fails all raise the same `ConfigError`."""
    made, problem = _attempt(make) if rank_and_world()[0] == 0 else ([], "")
    if problem := from_first_rank(problem):
        raise ConfigError(problem)
    return made[0] if made else None


def _attempt(make: Callable[[], T]) -> tuple[list[T], str]:
    try:
        return [make()], ""
    except ValueError as error:
        return [], str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return [], f"{where}{error.strerror or error}"
