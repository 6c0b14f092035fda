"""The doctor says what each op runs, and its exit status whether that is what was meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from i2i_dist import doctor, ops

ROOT = Path(__file__).resolve().parent.parent


def rows(lines: list[str], device: str) -> dict[str, str]:
    """Return what each op runs on `device`."""
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("op ")) + 1 :]
    return {line.split()[0]: line.split()[2] for line in table if line.split()[1] == device}


def test_every_op_is_named_with_what_it_runs() -> None:
    lines, healthy = doctor.report()
    found = rows(lines, "cpu")
    assert set(found) == set(ops.KERNELS)
    assert healthy == all(kind == "kernel" for kind in found.values())
    assert healthy == (ops.build_info()["problem"] is None)


def test_a_reference_that_was_asked_for_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", "reference")
    lines, healthy = doctor.report()
    assert healthy and set(rows(lines, "cpu").values()) == {"reference"}
    assert all(line.endswith("I2I_DIST_OPS=reference") for line in lines if " reference " in line)


def test_a_missing_extension_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"extension": False, "problem": "the extension is not built; do this", "cuda_archs": []}
    monkeypatch.setattr(ops, "build_info", lambda: lacking)
    monkeypatch.setattr(ops, "choose", lambda op, device: ops.Choice(False, lacking["problem"]))
    lines, healthy = doctor.report()
    assert not healthy
    assert sum("not built; do this" in line for line in lines) == 1 + len(ops.KERNELS)


def test_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(ROOT / "launchers" / "doctor.py")]
    monkeypatch.setenv("I2I_DIST_OPS", "reference")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "patch_nce" in done.stdout
    monkeypatch.setenv("I2I_DIST_OPS", "fast")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "use auto, native or reference" in done.stderr
