"""A rank ends when another has died, and never because another has ended in order."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from i2i_dist import lifeline
from i2i_dist.distributed import Ranks, adopt_environment, barrier
from i2i_dist.lifeline import Lifeline
from i2i_dist.processes import begin_of
from tests.ranks import run_ranks


def _here() -> Ranks:
    return adopt_environment(os.environ)


def leaves_at_its_own_time() -> None:
    """Rank 0, whose store the others have asked, ends first, and rank 2 long after it would have ended for a death."""
    lifeline.PATIENCE = 0.5
    line = Lifeline(_here())
    time.sleep(1.5)
    line.cut()
    barrier()
    time.sleep((0.0, 1.0, 4.0)[_here().rank])


def test_ranks_that_end_in_order_end_no_other(tmp_path: Path) -> None:
    run_ranks(3, "tests.test_lifeline:leaves_at_its_own_time", tmp_path)
    for rank in range(3):
        assert (tmp_path / f"rank_{rank}.log").read_text() == ""


def told_of_what_is_not_seen(how: str) -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("i2i_dist").addHandler(handler)
    logging.getLogger("i2i_dist").setLevel(logging.INFO)
    if how == "no pidfd":
        del os.pidfd_open
    if how == "machines of one name":  # where each finds another process, or none, by the other's id
        lifeline.begin_of = lambda pid: begin_of(pid) + _here().rank  # type: ignore[attr-defined]
    Lifeline(_here()).cut()
    barrier()
    return told


@pytest.mark.parametrize("how", ["no pidfd", "machines of one name"])
def test_processes_that_cannot_be_watched_are_named_once(tmp_path: Path, how: str) -> None:
    told, others = run_ranks(2, "tests.test_lifeline:told_of_what_is_not_seen", tmp_path, how)
    assert len(told) == 1 and "has no pidfd: 0, 1. If one dies" in told[0] and others == []


def test_a_rank_alone_watches_nothing() -> None:
    Lifeline(Ranks(0, 1, 0, 1)).cut()
