"""Loads the compiled extension, says what is in it, and carries out I2I_DIST_OPS."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

KERNELS: Mapping[str, tuple[str, ...]] = {}
"""Which device types csrc/ has a kernel for, by op."""

REBUILD = "build it with `pip install --no-build-isolation --no-deps -e .` in the repository"


class Extension(NamedTuple):
    """The compiled extension as found: its build facts, or the sentence that says why there are none."""

    facts: Mapping[str, Any]
    problem: str | None


def build_info() -> dict[str, Any]:
    """Say what the compiled extension holds.

    Returns:
        `extension` (bool: loaded), `cpu` and `cuda` (lists of native ops), `cuda_archs` (list of str such as "9.0"),
        `cuda_version` (str, or None without CUDA objects), `torch` (release built against, or None), `problem`
        (a sentence if the extension could not be loaded, else None).
    """
    found = load()
    absent: dict[str, Any] = {"cpu": [], "cuda": [], "cuda_archs": [], "cuda_version": None, "torch": None}
    return {"extension": found.problem is None, **absent, **found.facts, "problem": found.problem}


def choose_reference(op: str, device_type: str) -> None:
    """Permit the reference of `op` to run on `device_type`, in the way that I2I_DIST_OPS asks for.

    `auto` is silent where no kernel has been written, and warns once where one has but is missing here; `reference`
    is silent; `native` refuses.

    Raises:
        ValueError: If I2I_DIST_OPS is `native`, or something else than `auto`, `native` or `reference`.
    """
    mode = _mode()
    written = device_type in KERNELS.get(op, ())
    if mode == "reference" or (mode == "auto" and not written):
        return
    reason = (load().problem or f"the extension was built without it; {REBUILD}") if written else "none is written yet"
    if mode == "native":
        raise ValueError(
            f"I2I_DIST_OPS=native, but there is no {device_type} kernel of {op}: {reason}. "
            f"Or set I2I_DIST_OPS=auto to run the reference in plain torch."
        )
    _warn_once(f"{op} runs its slower reference in plain torch on {device_type}: {reason}.")


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


def _mode() -> str:
    mode = os.environ.get("I2I_DIST_OPS", "auto")
    if mode not in ("auto", "native", "reference"):
        raise ValueError(f"I2I_DIST_OPS={mode!r} is not known; use auto, native or reference.")
    return mode


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)
