"""The CUDA kernels without a GPU: builds csrc/ with csrc/testing/emulation.h and loads it as torch.ops.i2i_emulated.

A test writes

    with emulated.schedule(seed, late) as ops:
        out = ops.patch_gather(features, ids)

and parametrizes over `SCHEDULES`. What is allocated inside the `with`, by the test or by the op, lies between guards
and is NaN until it is written.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "tests"
SOURCES = ["csrc/cuda/*.cu", "csrc/testing/*.cu", "csrc/launch/*.cpp", "csrc/testing/*.cpp"]
NATIVE_ONLY = {"csrc/cuda/build.cu"}  # asks the CUDA runtime for its version
FLAGS = ["-O1", "-fPIC", "-fvisibility=hidden", "-DI2I_EMULATED", "-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
SCHEDULES = [(seed, late) for seed in (0, 1) for late in (False, True)]
CAUGHT = 3
"""The exit status of a check that failed as a check should: by an assertion or the emulator's own error."""


on_device = False
"""Whether the kernels run on a GPU; set by the fixture `where`."""


class OnDevice:
    """The native ops for tensors on the CPU: arguments go to the GPU with their strides, results come back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.i2i_dist, name)
        return lambda *arguments: _to_cpu(op(*map(_to_cuda, arguments)))


def _to_cuda(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_to_cuda(one) for one in argument]
    if not torch.is_tensor(argument):
        return argument
    memory = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).cuda()
    return memory.as_strided(argument.size(), argument.stride(), argument.storage_offset())


def _to_cpu(result: Any) -> Any:
    return result.cpu() if torch.is_tensor(result) else tuple(map(_to_cpu, result))


@contextmanager
def schedule(seed: int, late: bool) -> Iterator[Any]:
    """Yield the emulated ops, under this order of threads, with asynchronous copies that land `late` or at once.

    Where a test runs on a GPU, yield the native ops instead, for the same tensors on the CPU.
    """
    if on_device:
        yield OnDevice()
        return
    ops = _ops()
    ops.set_schedule(seed, late)
    ops.guard_memory(True)
    try:
        yield ops
    finally:
        ops.guard_memory(False)


@functools.cache
def _ops() -> Any:
    torch.ops.load_library(os.environ.get("I2I_EMULATED_LIBRARY") or library(ROOT))
    return torch.ops.i2i_emulated


def library(root: Path) -> Path:
    """Return the emulated library of the csrc/ in `root`, built unless an equal one has been."""
    if shutil.which("g++") is None:
        pytest.skip("the emulation of the CUDA kernels is built by g++, and there is none")
    sources = [path for pattern in SOURCES for path in sorted(root.glob(pattern))]
    sources = [path for path in sources if path.relative_to(root).as_posix() not in NATIVE_ONLY]
    objects = in_parallel(lambda source: _object(root, source), sources)
    libs = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    name = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:24]
    return make(BUILT / f"{name}.so", root, ["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), *libs])


def mutant(file: str, old: str, new: str) -> Path:
    """Return the emulated library of a csrc/ in which `new` stands for the only `old` of `file`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(ROOT / "csrc", root / "csrc")
        text = (root / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}; a mutation needs one place"
        (root / file).write_text(text.replace(old, new))
        return library(root)


def caught(library_file: Path, check: str) -> bool:
    """Run the function `check`, as in "tests.ops.test_x:check_y", with that library in a process of its own.

    Returns whether it failed; anything else than passing or failing as a check should is an error.
    """
    command = [sys.executable, "-c", f"from tests.ops import emulated; emulated.run_check({check!r})"]
    environment = {**os.environ, "I2I_EMULATED_LIBRARY": str(library_file)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode in (0, CAUGHT), f"{check} ended with {done.returncode}:\n{done.stderr}"
    return done.returncode == CAUGHT


def run_check(check: str) -> None:
    """Run the check and exit with CAUGHT if it fails by an assertion or an error of the emulation."""
    module, _, name = check.partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        function()
    except AssertionError:
        sys.exit(CAUGHT)
    except RuntimeError as error:
        if not str(error).startswith("emulated"):
            raise
        sys.exit(CAUGHT)


def _object(root: Path, source: Path) -> Path:
    torch_side = source.suffix == ".cpp"
    standard = "-std=c++20" if torch_side else "-std=c++17"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()] if torch_side else []
    name = source.relative_to(root).as_posix()
    command = ["g++", standard, *FLAGS, "-Icsrc", *includes, "-x", "c++", "-c", name]
    return make(BUILT / f"{source.stem}-{digest(root, source, torch.__version__, *command)}.o", root, command)


def digest(root: Path, source: Path, *facts: str) -> str:
    """Return a name for what becomes of `source`, the headers of csrc/ that it includes, and these facts."""
    found: dict[Path, str] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = path.read_text()
        for name in re.findall(r'^#include "(.+)"', found[path], flags=re.MULTILINE):
            places = [folder / name for folder in (path.parent, root / "csrc")]
            waiting += [place.resolve() for place in places if place.is_file()][:1]
    texts = [f"{path.relative_to(root.resolve())}\n{found[path]}" for path in sorted(found)]
    return hashlib.sha256("\n".join([*facts, *texts]).encode()).hexdigest()[:24]


def make(target: Path, root: Path, command: list[str]) -> Path:
    """Let a compiler make `target` in `root`, unless it is there; others that make it at the same time do no harm.

    What the compiler said stands beside it, as `target`.log.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{os.getpid()}-{target.name}")
    done = subprocess.run([*command, "-o", str(unfinished)], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} does not build {target.name}:\n{done.stderr}")
    target.with_name(f"{target.name}.log").write_text(done.stderr)
    unfinished.replace(target)
    return target


def in_parallel(function: Callable[[Path], Path], sources: list[Path]) -> list[Path]:
    """Call `function` for all sources, MAX_JOBS at a time, at most two unless that says otherwise."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", min(2, os.cpu_count() or 1)))) as pool:
        return list(pool.map(function, sources))
