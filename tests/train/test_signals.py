"""A run that is asked to stop finishes its update, saves, says how to go on, and is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from i2i_dist import checkpoint, loop, stopping
from i2i_dist.stopping import StopRequest, has_launcher, nobody_reads
from tests.ranks import free_port
from tests.train.runs import SCRIPT, Started, checkpoints, finish, launch, rows, settings, start_ranks

# With a reading process on each rank, for a signal to a process group reaches those too.
ENDLESS = settings(schedule__constant_epochs=5000, output__checkpoint_every_images=100_000, data__workers=1)


def assert_saved_where_it_stopped(run: Path, text: str) -> int:
    """The only news is a checkpoint of the last update that the log tells of; returns its images."""
    assert 'i2i_dist/train.py", line' not in text  # the deepspeed command itself ends in a traceback after Ctrl-C
    last = rows(run)[-1]["images_seen"]
    assert checkpoints(run)[-1] == f"images_{last:012d}"
    for name in checkpoints(run):
        checkpoint.verify(run / "checkpoints" / name)
    assert not list((run / "checkpoints").glob(".writing-*"))
    return int(last)


def resume_line(process: Started) -> str:
    (found,) = re.findall(r"Stopped\. Resume with: (.+)", process.text)
    return str(found)


def test_ctrl_c_and_sigterm_through_deepspeed(dclgan: Path, tmp_path: Path) -> None:
    """Ctrl-C twice at the terminal; then the printed command as it stands, ended by SIGTERM to the front end alone.

    The front end ends at once and hands nothing on; the ranks notice that it is gone.
    """
    run = tmp_path / "run"
    words = [SCRIPT, "--config", str(dclgan), "--run", str(run), *ENDLESS]
    terminal, stdin = pty.openpty()
    first = launch(
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *words],
        tmp_path / "first",
        stdin=stdin,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    first.wait_for("img 8/")
    os.write(terminal, b"\x03")
    time.sleep(0.1)
    os.write(terminal, b"\x03")
    first.wait_until_gone()
    os.close(terminal)
    os.close(stdin)
    stopped = assert_saved_where_it_stopped(run, first.text)

    second = launch(["sh", "-c", f"exec {resume_line(first)}"], tmp_path / "second")
    second.wait_for(f"img {stopped + 4}/")
    second.signal(signal.SIGTERM)
    second.wait_until_gone()
    assert "resumes at image" in second.text
    assert resume_line(second) == resume_line(first)
    assert assert_saved_where_it_stopped(run, second.text) >= stopped + 4
    assert [row["images_seen"] for row in rows(run)] == list(range(2, rows(run)[-1]["images_seen"] + 1, 2))


def test_more_signals_tear_nothing(cyclegan: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(2, ["--config", cyclegan, "--run", run, *ENDLESS], tmp_path / "log")
    ranks[0].wait_for("img 8/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for rank in ranks:
            if rank.poll() is None:
                rank.signal_group(number)
        time.sleep(0.03)
    codes, (text, _) = finish(ranks)
    assert codes == [75, 75], text
    assert_saved_where_it_stopped(run, text)


def test_signals_tear_no_checkpoint_that_is_being_written(dclgan: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", str(dclgan), *ENDLESS, *settings(output__checkpoint_every_images=8), "--run", str(run)]
    ranks = start_ranks(2, words, tmp_path / "log", hooks=["second_checkpoint_waits_for_a_signal"] * 2)
    for rank in ranks:
        rank.wait_for("writing the second checkpoint")
    assert list((run / "checkpoints").glob(".writing-*"))
    for number in (signal.SIGTERM, signal.SIGINT):
        for rank in ranks:
            rank.signal(number)
        time.sleep(0.1)  # two alike that wait are one
    codes, (text, _) = finish(ranks)
    assert codes == [75, 75], text
    last = assert_saved_where_it_stopped(run, text)
    assert checkpoints(run)[:2] == [f"images_{images:012d}" for images in (8, 16)] and last >= 16


def test_all_ranks_tell_of_a_launcher_that_one_has_lost(dclgan: Path, tmp_path: Path) -> None:
    """For a supervisor on another node would take the end of its own ranks for one that somebody has asked for."""
    words = ["--config", str(dclgan), *ENDLESS, "--run", str(tmp_path / "run")]
    codes, texts = finish(start_ranks(2, words, tmp_path / "log", hooks=["a_launcher_is_lost_at_update_5"] * 2))
    assert codes == [75, 75], texts
    assert all("told the supervisor of the loss" in text for text in texts)


def test_a_signal_during_the_start_is_heard(dclgan: Path, tmp_path: Path) -> None:
    """It may come before there is anything to save; the run then does one update and leaves in order."""
    run = tmp_path / "run"
    ranks = start_ranks(2, ["--config", dclgan, "--run", run, *ENDLESS], tmp_path / "log")
    while not (run / ".lock").exists():  # the handlers are set before
        time.sleep(0.005)
    ranks[1].signal(signal.SIGUSR1)
    codes, (text, _) = finish(ranks)
    assert codes == [75, 75], text
    assert assert_saved_where_it_stopped(run, text) == 2


def test_the_command_of_plain_python_resumes(dclgan: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = launch(["python", SCRIPT, "--config", str(dclgan), "--run", str(run), *ENDLESS], tmp_path / "first")
    first.wait_for("img 8/")
    first.signal(signal.SIGTERM)
    assert first.wait() == 75, first.text
    stopped = assert_saved_where_it_stopped(run, first.text)
    second = launch(["sh", "-c", f"exec {resume_line(first)}"], tmp_path / "second")
    second.wait_for(f"img {stopped + 2}/")
    second.signal(signal.SIGTERM)
    assert second.wait() == 75, second.text


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_closed_connection_is_seen(kind: str) -> None:
    """What standard output is to a process that ssh has started; while somebody is there it may be full."""
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    assert not nobody_reads(writer)
    os.close(reader)
    assert nobody_reads(writer)
    os.close(writer)


def test_a_file_needs_no_reader(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert not nobody_reads(file.fileno())


def test_only_what_a_launcher_has_started_looks_whether_it_is_there() -> None:
    """A shell that ends, with or without nohup, must not stop a run that was started from it."""
    assert not has_launcher({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        assert has_launcher({name: "1"})


def test_a_lost_launcher_is_noted_before_it_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console or a disk that the log waits for must not keep the run from stopping."""
    stop = object.__new__(StopRequest)
    stop.asked, stop.launcher_lost, stop.together = False, False, True
    noted: list[tuple[bool, bool]] = []
    monkeypatch.setattr(stopping._log, "warning", lambda text: noted.append((stop.asked, stop.launcher_lost)))
    for _ in range(2):  # the second time somebody had asked before
        stop._watch((2**22 + 1,))  # no process has such a number
    assert noted == [(True, True), (True, False)]


def test_a_loss_that_is_noticed_while_flags_are_exchanged_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that takes as long as an update."""
    stop = SimpleNamespace(asked=False, launcher_lost=False)

    def exchange(flags: Tensor) -> list[bool]:
        stop.launcher_lost = stop.asked = True
        return [bool(flag) for flag in flags.tolist()]

    monkeypatch.setattr(loop, "any_rank", exchange)
    checkpoints = object.__new__(loop._Checkpoints)
    checkpoints._run = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    checkpoints._saver = SimpleNamespace(flags=(False, False), advance=lambda *flags: None)  # type: ignore[assignment]
    checkpoints._reporter = SimpleNamespace(meter=SimpleNamespace(end=lambda images: None))  # type: ignore[assignment]
    assert not checkpoints.stop_asked(stop, 2)  # type: ignore[arg-type]
    assert stop.launcher_lost
