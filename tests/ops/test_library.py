"""I2I_DIST_OPS and the extension that is missing, foreign or broken."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from i2i_dist import ops
from i2i_dist.ops import _library


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Let every test load the extension and warn afresh."""
    for cached in (_library.load, _library._warn_once):
        cached.cache_clear()
    yield
    for cached in (_library.load, _library._warn_once):
        cached.cache_clear()


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose CPU kernel has been written, and no extension."""
    monkeypatch.setattr(_library, "KERNELS", {"op": ("cpu",)})
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_ops_without_kernels_run_silently(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.patch_nce_loss(torch.ones(2, 2), torch.ones(2, 2))


def test_native_refuses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", "native")
    with pytest.raises(ValueError, match=r"no cpu kernel of patch_nce_loss: none is written yet.*I2I_DIST_OPS=auto"):
        ops.patch_nce_loss(torch.ones(2, 2), torch.ones(2, 2))


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", "fast")
    with pytest.raises(ValueError, match="'fast' is not known; use auto, native or reference"):
        ops.l2_normalize(torch.ones(2, 2))


@pytest.mark.usefixtures("missing")
def test_a_missing_kernel_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        RuntimeWarning, match="op runs its slower reference .* on cpu: the extension is not built; build"
    ):
        _library.choose_reference("op", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.choose_reference("op", "cpu")
        _library.choose_reference("op", "cuda")
    monkeypatch.setenv("I2I_DIST_OPS", "native")
    with pytest.raises(ValueError, match="the extension is not built; build it with `pip install"):
        _library.choose_reference("op", "cpu")


@pytest.mark.usefixtures("missing")
def test_build_info_without_an_extension() -> None:
    info = ops.build_info()
    assert info["extension"] is False and info["torch"] is None and "not built" in info["problem"]
    assert info["cpu"] == info["cuda"] == info["cuda_archs"] == [] and info["cuda_version"] is None


def test_an_extension_of_another_release_is_recognised_before_loading(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"\x7fELF\0i2i_dist built against torch 2.11.0\0\xff")
    assert _library.mismatch(library, "2.11.0+cu130") is None
    sentence = _library.mismatch(library, "2.13.0a0+git1")
    assert sentence is not None
    assert sentence.startswith("the extension was built against torch 2.11.0, and this is torch 2.13.0; build it")
    library.write_bytes(b"\x7fELF")
    assert "an unknown release" in str(_library.mismatch(library, "2.11.0"))


def test_a_foreign_or_broken_extension_is_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_C.so"
    spec = _library.importlib.util.spec_from_file_location("i2i_dist._C", library)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: spec)
    library.write_bytes(b"i2i_dist built against torch 1.0.0")
    assert "built against torch 1.0.0" in ops.build_info()["problem"]
    _library.load.cache_clear()

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: x")

    release = torch.__version__.split("+")[0]
    library.write_bytes(f"i2i_dist built against torch {release}".encode())
    monkeypatch.setattr(_library.importlib, "import_module", broken)
    assert "does not load (undefined symbol: x)" in ops.build_info()["problem"]
