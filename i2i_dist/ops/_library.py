"""Loads the compiled extension, says what is in it, and carries out I2I_DIST_OPS."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

KERNELS: Mapping[str, tuple[str, ...]] = {
    "patch_nce": ("cpu", "cuda"),
    "adalin": ("cpu", "cuda"),
    "instance_norm_act": ("cpu", "cuda"),
    "patch_gather": ("cpu", "cuda"),
}
"""Which device types csrc/ has a kernel for, by op."""

REBUILD = "build it with `pip install --no-build-isolation --no-deps -e .` in the repository"


class Extension(NamedTuple):
    """The compiled extension as found: its build facts, or the sentence that says why there are none."""

    facts: Mapping[str, Any]
    problem: str | None


def build_info() -> dict[str, Any]:
    """Say what the compiled extension holds.

    Returns:
        `extension` (bool: loaded), `openmp` (bool: CPU kernels use several threads), `cpu` and `cuda` (lists of native
        ops), `cuda_archs` (list of str such as "9.0"), `cuda_version` (str, or None without CUDA objects),
        `cuda_driver` (str: what the driver here knows at most, "0.0" without one; or None), `torch` (release built
        against, or None), `problem` (a sentence if the extension could not be loaded, else None).
    """
    found = load()
    absent: dict[str, Any] = {
        "openmp": False,
        "cpu": [],
        "cuda": [],
        "cuda_archs": [],
        "cuda_version": None,
        "cuda_driver": None,
        "torch": None,
    }
    return {"extension": found.problem is None, **absent, **found.facts, "problem": found.problem}


class Choice(NamedTuple):
    """Which implementation of an op runs on a device type, and why, as the end of a sentence."""

    native: bool
    reason: str


def choose(op: str, device_type: str) -> Choice:
    """Choose between the kernel and the reference of `op` on `device_type`, in the way that I2I_DIST_OPS asks for.

    Raises:
        ValueError: If I2I_DIST_OPS is something else than `auto`, `native` or `reference`.
    """
    return _choose(op, device_type, _mode())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def use_native(op: str, device_type: str) -> bool:
    """Return whether to run the kernel of `op`; a reference that runs for want of a kernel is said once.

    Kernels know the derivative that backward passes take. What torch.func and forward mode ask for comes from the
    reference, always. A compiled function keeps the choice that was made when it was compiled.

    Raises:
        ValueError: If I2I_DIST_OPS is `native` and there is no kernel, or if its value is not known.
    """
    if device_type == "meta":  # nothing is computed there, so nothing has to be native
        return False
    choice = choose(op, device_type)
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if choice.native or _mode() == "reference":
        return choice.native
    if _mode() == "native":
        raise ValueError(
            f"I2I_DIST_OPS=native, but the {device_type} kernel of {op} cannot run: {choice.reason}. "
            f"Or set I2I_DIST_OPS=auto to run the reference in plain torch."
        )
    if device_type in KERNELS.get(op, ()):
        _warn_once(f"{op} runs its slower reference in plain torch on {device_type}: {choice.reason}.")
    return False


def implementations(device_type: str) -> dict[str, str]:
    """Return `"native"` or `"reference"` for every op that has a kernel somewhere; warns and raises as the ops do."""
    return {op: "native" if use_native(op, device_type) else "reference" for op in KERNELS}


@functools.cache
def load() -> Extension:
    """Load the extension, once; never raises for an extension that is absent or does not fit."""
    spec = importlib.util.find_spec("i2i_dist._C")
    if spec is None or spec.origin is None:
        return Extension({}, f"the extension is not built; {REBUILD}")
    problem = mismatch(Path(spec.origin), torch.__version__)
    if problem:
        return Extension({}, problem)
    try:
        facts: Mapping[str, Any] = importlib.import_module("i2i_dist._C").build_facts()
    except ImportError as error:
        return Extension({}, f"the extension does not load ({error}); {REBUILD}")
    return Extension(facts, None)


def mismatch(extension: Path, running: str) -> str | None:
    """Return why the file `extension` must not be loaded into torch `running`, or None if it may.

    The release that it was built against is read from the file: torch's C++ interface changes between releases, and
    loading an extension of another one can end the process.
    """
    mark = re.search(rb"i2i_dist built against torch ([0-9.]+)", extension.read_bytes())
    built = mark.group(1).decode() if mark else "an unknown release"
    release = re.split(r"[+a-z]", running)[0]
    if built == release:
        return None
    return f"the extension was built against torch {built}, and this is torch {release}; {REBUILD}"


@functools.cache
def _choose(op: str, device_type: str, mode: str) -> Choice:
    if mode == "reference":
        return Choice(False, "I2I_DIST_OPS=reference")
    if device_type not in KERNELS.get(op, ()):
        return Choice(False, f"no kernel is written for {device_type}")
    found = load()
    if found.problem is not None:
        return Choice(False, found.problem)
    if op not in found.facts[device_type]:
        return Choice(False, f"the extension was built without it; {REBUILD}")
    if device_type == "cuda":
        built, driver = found.facts["cuda_version"], found.facts["cuda_driver"]
        if int(driver.split(".")[0]) < int(built.split(".")[0]):
            return Choice(
                False,
                f"the extension was built with CUDA {built} and the driver knows {driver} at most; update the driver, "
                f"or put an older nvcc first in PATH and {REBUILD}",
            )
        capability = torch.cuda.get_device_capability()
        if not covers(found.facts["cuda_archs"], capability):
            archs, own = " ".join(found.facts["cuda_archs"]), ".".join(map(str, capability))
            return Choice(
                False, f"the extension was built for {archs} and this GPU is {own}; set I2I_DIST_CUDA_ARCHS, {REBUILD}"
            )
    return Choice(True, f"the extension has a {device_type} kernel")


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether machine code for `archs`, such as "8.6" or "12.0+PTX", runs on a GPU of `capability`.

    Machine code runs on its major version from its minor version on ("9.0a": on no other), PTX on everything later.
    """
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        version = tuple(map(int, number.rstrip("af").split(".")))
        same_major = version[0] == capability[0] and version[1] <= capability[1]
        if version == capability or (not number.endswith("a") and (same_major or (ptx and version <= capability))):
            return True
    return False


def _mode() -> str:
    mode = os.environ.get("I2I_DIST_OPS", "auto")
    if mode not in ("auto", "native", "reference"):
        raise ValueError(f"I2I_DIST_OPS={mode!r} is not known; use auto, native or reference.")
    return mode


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)
