"""What rank 0 writes into a run's directory reaches the other machines, whose file system may show it late."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from i2i_dist import run_directory
from i2i_dist.config import ConfigError


def test_the_lock_is_on_the_disk_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    with run_directory.lock(tmp_path):
        text = (tmp_path / ".lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        assert flushed == [len(text)]


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
