"""How much memory a form takes at most beyond its inputs; on a CPU in a fresh process for each form."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from i2i_dist.bench.kernel_cases import Case, Form, build
from i2i_dist.bench.timing import compiled, math_mode, run_once

TIME_LIMIT, ENDING = 300, 10  # seconds
MMAP_THRESHOLD = -3  # the number of mallopt's parameter in glibc


def limit_memory() -> None:
    """Make an allocation beyond what the machine has free an error in this process instead of the machine's end."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    resource.setrlimit(resource.RLIMIT_DATA, (available, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def peak_bytes(case: Case, form: Form, grad: torch.Tensor | None) -> int | None:
    """Return the peak of outputs, gradients and all between them, after a warm-up; None where nothing tells it."""
    if form.leaves[0].device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_once(form, grad)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Forked from a process that has the imports behind it and has never computed: there is one for each start method.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, case, form.name, torch.get_num_threads(), os.environ.get("I2I_DIST_OPS", "auto"))
    process = context.Process(target=_answer, args=arguments)
    process.start()
    theirs.close()
    try:
        return int(ours.recv()) if ours.poll(TIME_LIMIT) else None
    except EOFError:
        return None
    finally:
        process.join(ENDING)  # torch.compile has processes of its own to end
        process.kill()
        process.join()


def _answer(pipe: Connection, case: Case, name: str, threads: int, mode: str) -> None:
    """Measure the form of that name. Memory that is freed goes back at once, so that the peak is of what is held."""
    os.environ["I2I_DIST_OPS"] = mode
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    limit_memory()
    problem = build(case, torch.device("cpu"))
    form = compiled(next(form for form in problem.forms if form.name == name))
    with math_mode(case.precision):
        run_once(form, problem.grad)
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        run_once(form, problem.grad)
    pipe.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
