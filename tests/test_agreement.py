"""Errors at the start: those that a person has to mend, and those that may pass by themselves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from i2i_dist import run_directory
from i2i_dist.agreement import TemporaryError, on_every_rank, on_first_rank
from i2i_dist.config import ConfigError


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, TemporaryError),
        (errno.EDQUOT, TemporaryError),
        (errno.EIO, TemporaryError),
        (errno.ESTALE, TemporaryError),
        (errno.ETIMEDOUT, TemporaryError),
        (errno.EMFILE, TemporaryError),
        (errno.ENOENT, ConfigError),
        (errno.EACCES, ConfigError),
        (errno.EROFS, ConfigError),
    ],
)
def test_errors_of_files(number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "a: b")

    for agree in (on_every_rank, on_first_rank):
        with pytest.raises(kind, match=f"^a: b: {os.strerror(number)}$"):
            agree(fails)
    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(kind, match=f"cannot be written: {os.strerror(number)}$"):
        on_first_rank(lambda: run_directory.lock(tmp_path))


def test_what_is_said_of_a_configuration_stays_so() -> None:
    def fails() -> None:
        raise ConfigError("data.root: given x")

    with pytest.raises(ConfigError, match=r"^data\.root: given x$"):
        on_every_rank(fails)


def test_a_lock_that_is_held_may_be_free_soon(tmp_path: Path) -> None:
    with run_directory.lock(tmp_path), pytest.raises(TemporaryError, match=f"in use by process {os.getpid()} on "):
        on_first_rank(lambda: run_directory.lock(tmp_path))
