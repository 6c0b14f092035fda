"""The tests of the CUDA kernels run by emulation, and on a GPU where there is one."""

from __future__ import annotations

import pytest

from tests.needs import GPU
from tests.ops import emulated


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=GPU)])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run; for the whole of a module by `pytestmark = pytest.mark.usefixtures("where")`."""
    place: str = request.param
    monkeypatch.setattr(emulated, "on_device", place == "cuda")
    return place
