"""Training runs that a study is made of."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def train_all(folder: Path, runs: Mapping[str, dict[str, Any]], jobs: int) -> None:
    """Train runs, configurations by name, so many at a time.

    Raises:
        RuntimeError: See `train`.
    """
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(train, folder, name, config) for name, config in runs.items()]
    for one in started:
        one.result()


def train(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Train in a process of its own, on one thread, so that several at a time change nothing in what comes out.

    A run that has been trained before is left as it is, and one that was stopped goes on.

    Args:
        folder: Receives NAME.yaml, NAME.log and the run directory NAME.
        name: Of the run.
        config: Its configuration.

    Raises:
        RuntimeError: Training failed; the message says where to read why.
    """
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    command = [sys.executable, "launchers/train.py", f"--config={path}", f"--run={folder / name}"]
    print(f"$ {shlex.join(command)}", flush=True)
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{name} ended with exit code {done.returncode}; {folder / f'{name}.log'} says why")
