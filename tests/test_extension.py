"""The compiled extension says what it was built from, and needs no CUDA to load."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from i2i_dist import ops

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.find_spec("i2i_dist._C")
built = pytest.mark.skipif(SPEC is None, reason="the extension is not built")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The functions of setup.py, without a build."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@built
def test_build_info_of_the_extension() -> None:
    info = ops.build_info()
    assert info["extension"] is True and info["problem"] is None
    assert info["openmp"] is True
    assert info["torch"] == torch.__version__.split("+")[0]
    assert bool(info["cuda_archs"]) == (info["cuda_version"] is not None)


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_extension_needs_and_shows_no_cuda_symbol() -> None:
    assert SPEC is not None and SPEC.origin is not None
    listing = subprocess.run(["nm", "-D", SPEC.origin], check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert "PyInit__C" in names
    assert not [name for name in names if name.startswith(("cu", "__cuda", "i2i_"))]


def test_every_source_is_listed_and_exists(script: dict[str, Any]) -> None:
    listed = {*script["SOURCES"], *script["LAUNCH_SOURCES"], *script["CUDA_SOURCES"]}
    suffixes = {".cpp", ".cu"}
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes}
    assert listed == {path for path in found if not path.startswith("csrc/testing/")}


def test_cuda_files_include_no_torch_and_the_binding_no_cuda(script: dict[str, Any]) -> None:
    for path in (ROOT / "csrc" / "cuda").iterdir():
        text = path.read_text()
        assert not any(f"<{name}/" in text for name in ("torch", "ATen", "c10", "pybind11")), path
    for path in script["SOURCES"] + script["LAUNCH_SOURCES"]:
        text = (ROOT / path).read_text()
        assert not any(name in text for name in ("<cuda", "c10/cuda", "ATen/cuda")), path


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A compiler that knows two architectures."""
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    program.chmod(0o755)
    return str(program)


def test_architectures(script: dict[str, Any], nvcc: str, capfd: pytest.CaptureFixture[str]) -> None:
    known = script["known_archs"]
    assert known(nvcc, "8.0;9.0a 12.0+PTX") == ["8.0", "9.0a"]
    assert "does not know architecture 12.0+PTX: left out" in capfd.readouterr().err
    assert known(nvcc, "none") == []
    assert "WITHOUT CUDA" in capfd.readouterr().err
    assert known(nvcc, "7.5") == [] and known(nvcc, "7.5 8.0") == ["8.0"]
    assert "7.5 is left out, and runs plain PyTorch" in capfd.readouterr().err
    with pytest.raises(ValueError, match="'sm_90' is no architecture"):
        known(nvcc, "sm_90")
    with pytest.raises(ValueError, match="knows none of them, only compute_80, compute_90"):
        known(nvcc, "10.0")


def test_a_missing_nvcc_is_said_aloud(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script["find_nvcc"]() is None
    assert "WITHOUT CUDA kernels" in capfd.readouterr().err
