"""A rank's log tells where each of its threads was when it hung, crashed or failed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

PRELUDE = """
import os, sys, time
from pathlib import Path
from i2i_dist import stacks
stacks.write_to(Path(sys.argv[1]), 0.2)
"""


def log_of(code: str, path: Path) -> tuple[int, str]:
    ended = subprocess.run([sys.executable, "-c", PRELUDE + code, str(path)], cwd=ROOT, check=False)
    return ended.returncode, path.read_text()


@pytest.mark.parametrize("wait", ["time.sleep(1.5)", "import ctypes; ctypes.PyDLL(None).usleep(1500000)"])
def test_a_rank_that_stands_still_writes_its_stacks(tmp_path: Path, wait: str) -> None:
    """Even where it holds Python's lock, as code of a library may."""
    code, log = log_of(f"def stands_still():\n    {wait}\nstands_still()", tmp_path / "log")
    assert code == 0
    assert "Timeout (0:00:00.200000)!" in log and "in stands_still" in log


def test_a_rank_that_gets_on_or_leaves_writes_none(tmp_path: Path) -> None:
    gets_on = "for _ in range(20): time.sleep(0.05); stacks.alive()"
    assert log_of(f"{gets_on}\nstacks.leaving(); time.sleep(1)", tmp_path / "log") == (0, "")


def test_a_rank_that_crashes_writes_its_stacks(tmp_path: Path) -> None:
    """SIGABRT is how NCCL's watchdog ends a process."""
    code, log = log_of("def crash(): os.abort()\ncrash()", tmp_path / "log")
    assert code == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in log and "in crash" in log


def test_an_error_is_written_with_its_traceback_and_all_threads(tmp_path: Path) -> None:
    code = """
import threading
def other(): time.sleep(60)
threading.Thread(target=other, daemon=True).start()
time.sleep(0.1)
try: {}["missing"]
except KeyError as error: assert stacks.write(error, "rank 3: what happened")
"""
    returned, log = log_of(code, tmp_path / "log")
    assert returned == 0
    assert log.index("ERROR rank 3: what happened") < log.index("KeyError: 'missing'") < log.index("in other")
