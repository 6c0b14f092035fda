"""Five minutes in which something of a run is killed every 5 to 20 seconds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.train.runs import SCRIPT, Started, checkpoints, launch, rows, settings, start_ranks
from tests.train.test_slurm import SIDES, slurm_environment

STORM = 300.0  # seconds


def settings_until(images: int) -> list[str]:
    return settings(schedule__constant_epochs=images // 8, data__workers=1)


def start_supervised(words: list[str], directory: Path, environment: dict[str, str]) -> Started:
    srun = ["srun", "--kill-on-bad-exit=1", "python", SCRIPT, *words]
    command = ["python", "launchers/supervise.py", "--restarts", "1000", "--", *srun]
    return launch(command, directory / "console", environment)


def punish(process: Started, until: float) -> tuple[set[int], int]:
    """Kill one of the launcher, the ranks and their readers again and again; return all ids seen, and how many died."""
    chance, seen, killed = random.Random(1), set(), 0
    own = psutil.Process(process.pid)
    while time.monotonic() < until:
        assert process.poll() is None, process.text[-4000:]
        strike = time.monotonic() + chance.uniform(5, 20)
        while time.monotonic() < strike:
            seen |= {one.pid for one in own.children(recursive=True)}
            time.sleep(0.2)
        if len(family := own.children(recursive=True)) > 1:  # else it is only about to start
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(family).kill()
                killed += 1
    return seen, killed


@pytest.mark.soak
def test_a_storm_of_kills_changes_no_weight_and_leaves_nothing(dclgan: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = slurm_environment(tmp_path)
    (tmp_path / "killed").touch()  # the faults of test_slurm.py
    (tmp_path / "waits").touch()
    shared_memory = set(os.listdir("/dev/shm"))
    words = ["--config", str(dclgan), "--run"]
    process = start_supervised([*words, str(run), *settings_until(10**6)], tmp_path, environment)
    seen, killed = punish(process, time.monotonic() + STORM)
    before = rows(run)[-1]["images_seen"]
    deadline = time.monotonic() + 300
    while rows(run)[-1]["images_seen"] < before + 8:
        assert process.poll() is None and time.monotonic() < deadline, process.text[-4000:]
        time.sleep(0.2)
    process.signal(signal.SIGTERM)
    assert process.wait() == 75, process.text[-4000:]

    stopped = rows(run)[-1]["images_seen"]
    restarts = process.text.count(" of 1000 in ")
    print(f"{killed} kills, {restarts} restarts, {stopped} images")
    assert restarts >= 3 and before > 0
    assert not [pid for pid in seen if psutil.pid_exists(pid)]
    names = set(os.listdir("/dev/shm")) - shared_memory
    assert not [name for name in names if any(str(pid) in name for pid in seen)]
    port = 20000 + int(environment["SLURM_JOB_ID"])
    assert not [one for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port]

    target = (stopped + 8) // 8 * 8
    for name in ("run", "whole"):
        ranks = start_ranks(2, [*words, str(tmp_path / name), *settings_until(target)], tmp_path / f"{name}_log")
        assert [one.wait(patience=1200) for one in ranks] == [0, 0], ranks[0].text[-4000:]
    assert [row["images_seen"] for row in rows(run)] == list(range(2, target + 1, 2))
    for side in SIDES:
        one, other = (tmp_path / name / "checkpoints" / checkpoints(run)[-1] / side for name in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()
