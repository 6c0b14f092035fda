"""launchers/slurm.sbatch, run as it is, with a srun and a scontrol of the tests."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import needs
from tests.ranks import ROOT
from tests.train.runs import Started, checkpoints, finish, launch, rows, settings, start_ranks

SCRIPT = "launchers/slurm.sbatch"
FAKES = Path(__file__).with_name("slurm")
LENGTH = settings(schedule__constant_epochs=6)  # 24 updates of two pictures; a checkpoint in every fourth
SIDES = ("generator.safetensors", "discriminator.safetensors")


def test_shellcheck_finds_nothing() -> None:
    shellcheck = needs.program("shellcheck", "shellcheck")
    scripts = [SCRIPT, str(FAKES / "scontrol")]
    found = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        return True
    return False


def slurm_environment(directory: Path) -> dict[str, str]:
    """What SLURM gives a job, with its commands replaced."""
    job = next(job for job in random.sample(range(12000), 100) if is_free(20000 + job))  # see distributed.py
    return {
        "PATH": os.pathsep.join([str(FAKES), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "FAKE_SLURM_LOG": str(directory / "slurm"),
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",  # a batch script's own shell has it, too
    }


def job(words: list[str], directory: Path, log: str) -> Started:
    return launch(["bash", SCRIPT, *words], directory / log, slurm_environment(directory))


def with_srun(directory: Path, body: str) -> dict[str, str]:
    """SLURM's environment, with a srun that trains nothing."""
    (directory / "srun").write_text(f"#!/bin/bash\n{body}\n")
    (directory / "srun").chmod(0o755)
    environment = slurm_environment(directory)
    return environment | {"PATH": f"{directory}{os.pathsep}{environment['PATH']}"}


STARTED = 'touch "${0%/*}/there"'
SLEEPS = f"{STARTED}; exec sleep 600"
FAILS = f"""
trap 'kill $!; python -c "from i2i_dist import supervise; supervise.report(1)"; exit 1' USR1
sleep 600 & {STARTED}; wait
"""


@pytest.mark.parametrize(
    ("srun", "numbers", "code", "requeued"),
    [
        (SLEEPS, [signal.SIGUSR1, signal.SIGUSR1], 75, 1),
        (SLEEPS, [signal.SIGTERM], 75, 0),
        (FAILS, [signal.SIGUSR1], 1, 1),
    ],
    ids=["time is up", "cancelled", "time is up and a rank fails"],
)
def test_a_job_is_queued_again_once_when_its_time_is_up_and_never_when_cancelled(
    dclgan: Path, tmp_path: Path, srun: str, numbers: list[signal.Signals], code: int, requeued: int
) -> None:
    environment = with_srun(tmp_path, srun)
    process = launch(["bash", SCRIPT, "--config", str(dclgan)], tmp_path / "console", environment)
    while not (tmp_path / "there").exists():
        assert process.poll() is None, process.text
        time.sleep(0.01)
    for number in numbers:
        process.signal(number)
    assert process.wait() == code, process.text
    told = (tmp_path / "slurm").read_text() if (tmp_path / "slurm").exists() else ""
    assert told == f"scontrol requeue {environment['SLURM_JOB_ID']}\n" * requeued


@pytest.mark.parametrize("words", [["--set", "train.seed=x"], ["--seeds"]])
def test_a_mistake_ends_the_job_before_its_first_step(dclgan: Path, tmp_path: Path, words: list[str]) -> None:
    environment = with_srun(tmp_path, STARTED)
    process = launch(["bash", SCRIPT, "--config", str(dclgan), *words], tmp_path / "console", environment)
    assert process.wait() == 2, process.text
    assert words[-1].partition("=")[0] in process.text
    assert not (tmp_path / "there").exists()


def last_time(text: str, log: str) -> float:
    """When a line of a rank's log last held this, in seconds since 1970."""
    found = [line for line in log.splitlines() if text in line][-1]
    return time.mktime(time.strptime(found[:19], "%Y-%m-%d %H:%M:%S")) + int(found[20:23]) / 1000


def test_a_killed_rank_and_the_end_of_the_time_change_no_weight(dclgan: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in update 7, the time is up in update 16, the job comes back: as if nothing had been."""
    run, told = tmp_path / "run", tmp_path / "slurm"
    words = ["--config", str(dclgan), *LENGTH, "--run"]
    first = job([*words, str(run)], tmp_path, "first")
    deadline = time.monotonic() + 200
    while not (tmp_path / "waits").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.text
        time.sleep(0.05)
    first.signal(signal.SIGUSR1)
    assert first.wait() == 75, first.text
    first.wait_until_gone()
    events = told.read_text().splitlines()
    assert "rank 1 ended with 137" in events and "rank 0 ended with 1" in events
    assert "the command ended with exit code 1; restart 1 of 3" in first.text
    assert "resumes at image 8" in first.text  # of 14: what was lost is less than a checkpoint's interval
    assert events.count("srun SIGUSR1") == 1
    heard = sorted(event for event in events if "heard SIGUSR1" in event)
    assert heard == ["rank 0 heard SIGUSR1", "rank 1 heard SIGUSR1"]
    assert [event.split()[:2] for event in events if "scontrol" in event] == [["scontrol", "requeue"]]
    assert checkpoints(run)[-1] == f"images_{34:012d}"
    killed = (tmp_path / "killed").stat().st_mtime
    noticed = min(float(event.split()[-1]) for event in events if "srun ended" in event) - killed
    back = last_time("img 10/48", (run / "logs" / "rank_0000.log").read_text())
    print(f"a killed rank: noticed after {noticed:.1f} s, training again after {back - killed:.1f} s")
    assert noticed <= 10

    second = job([*words, str(run)], tmp_path, "second")
    assert second.wait() == 0, second.text
    assert "resumes at image 34" in second.text
    assert told.read_text().count("scontrol") == 1
    assert [row["images_seen"] for row in rows(run)] == list(range(2, 49, 2))

    codes, texts = finish(start_ranks(2, [*words, str(tmp_path / "whole")], tmp_path / "whole_log"))
    assert codes == [0, 0], texts
    for side in SIDES:
        one, other = (tmp_path / name / "checkpoints" / f"images_{48:012d}" / side for name in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()
