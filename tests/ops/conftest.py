"""The tests of the CUDA kernels run by emulation, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.ops import emulated

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run; for the whole of a module by `pytestmark = pytest.mark.usefixtures("where")`."""
    place: str = request.param
    monkeypatch.setattr(emulated, "on_device", place == "cuda")
    return place
