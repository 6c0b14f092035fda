"""Runs a function of the tests on several ranks at once and brings back what each returned."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def run_ranks(world: int, function: str, directory: Path, *arguments: str, timeout: float = 280) -> list[Any]:
    """Call `module:function(*arguments)` on `world` ranks, inside a process group, and return each rank's result."""
    port = free_port()
    processes = []
    for rank in range(world):
        command = [sys.executable, "-m", "tests.ranks", function, str(directory / f"result_{rank}.pkl"), *arguments]
        log = (directory / f"rank_{rank}.log").open("w")
        processes.append(
            subprocess.Popen(command, env=rank_environment(rank, world, port), cwd=ROOT, stdout=log, stderr=log)
        )
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(1.0)  # the others' own errors, should they be the cause
            for process in processes:
                process.kill()
            break
        time.sleep(0.05)
    codes = [process.wait() for process in processes]
    if any(codes):
        logs = [f"--- rank {rank}\n{(directory / f'rank_{rank}.log').read_text()[-4000:]}" for rank in range(world)]
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(logs))
    return [pickle.loads((directory / f"result_{rank}.pkl").read_bytes()) for rank in range(world)]


def _main() -> None:
    name, result, *arguments = sys.argv[1:]
    module, _, function = name.partition(":")
    import deepspeed.runtime.zero.utils
    import torch

    from i2i_dist import engines
    from i2i_dist.distributed import adopt_environment

    engines.start(adopt_environment(os.environ), timeout_seconds=60)
    call = getattr(importlib.import_module(module), function)
    gc.freeze()  # what has been imported is no garbage
    # For each engine ZeRO 3 looks through all that is there for garbage, and makes a text of every parameter.
    deepspeed.runtime.zero.utils.gc = SimpleNamespace(collect=lambda: None)
    torch.set_printoptions(threshold=0, edgeitems=1)
    value = call(*arguments)
    Path(result).write_bytes(pickle.dumps(value))
    engines.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as launchers/train.py ends, and for its reason


if __name__ == "__main__":
    _main()
