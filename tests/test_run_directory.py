"""What rank 0 writes into a run's directory reaches the other machines, whose file system may show it late."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import IO

import pytest

from i2i_dist import run_directory
from i2i_dist.agreement import TemporaryError
from i2i_dist.config import ConfigError


def test_the_lock_is_on_the_disk_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    with run_directory.lock(tmp_path):
        text = (tmp_path / ".lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        assert flushed == [len(text)]


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EAGAIN, TemporaryError, "is in use by process 7 on node0; wait for it"),
        (errno.EACCES, TemporaryError, "is in use by process 7 on node0; wait for it"),
        (errno.ENOSYS, ConfigError, r"has no locks \(flock: Function not implemented\).*Lustre: -o flock"),
        (errno.ENOLCK, ConfigError, r"has no locks \(flock: No locks available\)"),
        (errno.EOPNOTSUPP, ConfigError, r"has no locks \(flock: Operation not supported\)"),
        (errno.EIO, TemporaryError, "cannot be locked: Input/output error"),
    ],
)
def test_only_a_lock_that_is_held_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], text: str
) -> None:
    def refuse(file: IO[str], how: int) -> None:
        files.append(file)
        raise OSError(number, os.strerror(number))

    files: list[IO[str]] = []
    (tmp_path / ".lock").write_text("process 7 on node0\n")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(kind, match=text):
        run_directory.lock(tmp_path)
    assert files[0].closed
    assert (tmp_path / ".lock").read_text() == "process 7 on node0\n"


@pytest.mark.parametrize("before", [None, "process 1 on another\n"], ids=["nothing", "an older holder"])
def test_a_rank_that_sees_the_lock_late_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    text = "process 7 on node0\n"
    monkeypatch.setattr(run_directory, "from_first_rank", lambda _: text)
    monkeypatch.setattr(run_directory, "gather_texts", lambda mine: [text, mine])
    if before is not None:
        (tmp_path / ".lock").write_text(before)
    later = threading.Timer(0.5, lambda: (tmp_path / ".lock").write_text(text))
    later.start()
    run_directory.check_shared(tmp_path)
    later.join()


def test_a_rank_that_never_sees_the_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_SEEN_SECONDS", 0.2)
    monkeypatch.setattr(run_directory, "from_first_rank", lambda _: "process 7 on node0\n")
    monkeypatch.setattr(run_directory, "gather_texts", lambda mine: ["process 7 on node0\n", mine])
    with pytest.raises(ConfigError, match="rank 1 does not see what rank 0 has written there"):
        run_directory.check_shared(tmp_path)
