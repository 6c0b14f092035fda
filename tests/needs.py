"""Tests that need more than Python packages are skipped where it is missing, but for continuous integration."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def skip(reason: str) -> None:
    """Skip this test, or fail it where I2I_DIST_REQUIRE_TOOLS is set: there everything is expected to be installed."""
    if "I2I_DIST_REQUIRE_TOOLS" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str, package: str) -> str:
    """Return the path of a program, or skip this test."""
    found = shutil.which(name)
    if found is None:
        skip(f"{name} is not installed; it comes with Debian's package {package}")
    return str(found)
