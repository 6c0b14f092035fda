"""Starts real training runs for the tests, waits for them, and leaves no process behind."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import ROOT, free_port, rank_environment

SCRIPT = "launchers/train.py"
PATIENCE = 120.0  # seconds; a busy machine must not fail a test

# Every update is logged, so that a log point is a fingerprint of the images that the update saw.
_BASE = {
    "schedule": {"epoch_images": 8, "constant_epochs": 3, "decay_epochs": 0},
    "train": {"global_batch": 2, "ema_half_life_images": 20},
    "output": {
        "log_every_images": 2,
        "sample_every_images": 1000,
        "sample_images": 1,
        "checkpoint_every_images": 8,
        "metrics_port": None,
    },
}
_METHODS = {
    "dclgan": {
        "name": "dclgan", "width": 4, "blocks": 1, "critic_width": 4, "head_dim": 8, "nce_patches": 8,
        "nce_layers": ["down1", "block1"], "pool_size": 3,
    },
    "cyclegan": {"name": "cyclegan", "width": 4, "blocks": 1, "critic_width": 4, "pool_size": 3},
}  # fmt: skip


def write_config(path: Path, data: Path, method: str = "dclgan") -> Path:
    data_section = {"root": str(data), "load_size": 36, "crop_size": 32, "workers": 0}
    path.write_text(json.dumps(_BASE | {"method": _METHODS[method], "data": data_section}))  # JSON is YAML
    return path


def settings(**values: Any) -> list[str]:
    """`output__keep_checkpoints=1` -> `--set output.keep_checkpoints=1`."""
    pairs = [(key.replace("__", "."), json.dumps(value)) for key, value in values.items()]
    return [word for key, value in pairs for word in ("--set", f"{key}={value}")]


class Started:
    """A process in a session of its own, and what it has printed."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]) -> None:
        self.pid, self.log, self.poll = pid, log, poll

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        os.killpg(self.pid, number)

    def wait(self, patience: float = PATIENCE) -> int:
        deadline = time.monotonic() + patience
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running:\n{self.text[-4000:]}"
            time.sleep(0.02)
        return code

    def wait_for(self, words: str, patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while words not in self.text:
            assert self.poll() is None and time.monotonic() < deadline, f"no {words!r} in:\n{self.text[-4000:]}"
            time.sleep(0.01)

    def wait_until_gone(self, patience: float = PATIENCE) -> None:
        """Wait for every process of the session: a launcher may end before its ranks do."""
        deadline = time.monotonic() + patience
        while self.poll() is None or _is_there(self.pid):
            assert time.monotonic() < deadline, f"session {self.pid} is still there:\n{self.text[-4000:]}"
            time.sleep(0.05)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


_started: list[Started] = []


def left_behind(patience: float = 5.0) -> list[str]:
    """Return what is still there of sessions whose first process has ended, after this many seconds."""
    ended = [one for one in _started if one.poll() is not None]
    deadline = time.monotonic() + patience
    while (left := [one for one in ended if _is_there(one.pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"session {one.pid}, whose log ends with {one.text[-500:]}" for one in left]


def kill_all() -> None:
    """Kill every session started since the last call, and what it has put into sessions of their own."""
    for one in _started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for below in psutil.Process(one.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    below.kill()
        for _ in range(100):
            try:
                os.killpg(one.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            one.poll()  # reaps the leader
            time.sleep(0.05)
        else:
            raise AssertionError(f"session {one.pid} does not end:\n{one.text[-2000:]}")
    _started.clear()


def launch(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, **options: Any) -> Started:
    """Start a command as people type it; `bin` of this Python is on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=clean | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment or {}),
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    _started.append(Started(process.pid, log, process.poll))
    return _started[-1]


_SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "AUTO",
    "PYTHONPATH": str(ROOT),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asked in any other way, the driver serves no process that is forked later
}


def start_server() -> None:
    """Start the process that has imported everything and forks a new one for each run: it saves seconds a run."""
    stop_server()  # one that other tests have left has loaded its libraries with other threads and modes
    before = dict(os.environ)
    os.environ.update(_SERVER_ENVIRONMENT)
    try:
        multiprocessing.set_forkserver_preload(["i2i_dist.train", "tests.train.runs"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def stop_server() -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, hook: str = "") -> Started:
    """Run launchers/train.py in a process of its own; `hook` names a function of tests/train/hooks.py to call first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    wanted = {"OMP_NUM_THREADS": "1"} | dict(environment or {})
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_enter, args=(list(arguments), str(log), wanted, hook))
    process.start()
    assert process.pid is not None
    _started.append(Started(process.pid, log, lambda: process.exitcode))
    return _started[-1]


def _enter(arguments: list[str], log: str, environment: dict[str, str], hook: str) -> None:
    os.setsid()
    assert os.environ.items() >= _SERVER_ENVIRONMENT.items(), "forked from a server that start_server did not start"
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [SCRIPT, *arguments]
    if hook:
        getattr(importlib.import_module("tests.train.hooks"), hook)()
    runpy.run_path(SCRIPT, run_name="__main__")


def start_ranks(
    world: int, arguments: Sequence[str] | Sequence[Sequence[str]], log: Path, hooks: Sequence[str] = ("", "")
) -> list[Started]:
    """Start all ranks of a run, as a launcher does; `arguments` may differ by rank. Logs: `log` with the rank added."""
    port, started = free_port(), []
    for rank in range(world):
        words = [str(word) for word in (arguments if isinstance(arguments[0], str) else arguments[rank])]
        name = log.with_name(f"{log.name}.{rank}")
        started.append(start(words, name, rank_environment(rank, world, port), hooks[rank]))
    return started


def finish(started: Sequence[Started]) -> tuple[list[int], list[str]]:
    """Wait for all and return their exit codes and texts."""
    return [one.wait() for one in started], [one.text for one in started]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("images_*"))


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
