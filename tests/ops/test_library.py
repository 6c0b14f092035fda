"""I2I_DIST_OPS and the extension that is missing, foreign or broken."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from i2i_dist import ops
from i2i_dist.ops import _library

KERNELS = dict(_library.KERNELS)
CACHES = (_library.load, _library._choose, _library._warn_once)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Let every test load the extension, choose and warn afresh."""
    for cached in CACHES:
        cached.cache_clear()
    yield
    for cached in CACHES:
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
        ops.instance_norm_act(torch.ones(2, 2, 2, 2, device="meta"))


def test_native_refuses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", "native")
    monkeypatch.setattr(_library, "KERNELS", {**KERNELS, "patch_nce": ("cuda",)})
    sentence = r"cpu kernel of patch_nce cannot run: no kernel is written.*I2I_DIST_OPS=auto"
    with pytest.raises(ValueError, match=sentence):
        ops.patch_nce_loss(torch.ones(2, 2), torch.ones(2, 2))
    # On the meta device nothing is computed, so nothing has to be native.
    assert ops.patch_nce_loss(torch.ones(2, 2, device="meta"), torch.ones(2, 2, device="meta")).shape == (2,)


@pytest.mark.usefixtures("missing")
@pytest.mark.filterwarnings("ignore:.*runs its slower reference:RuntimeWarning")
def test_every_op_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "KERNELS", KERNELS)
    rows, x = torch.eye(4).requires_grad_(), torch.randn(2, 3, 4, 4, requires_grad=True)
    values = torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)
    with mock.patch.object(torch.ops, "i2i_dist", None):
        results = [
            ops.patch_nce_loss(rows, rows),
            ops.instance_norm_act(x, activation="relu", residual=x),
            ops.adalin(x, *values),
            ops.iln(x, *(value[0] for value in values[:2]), values[2]),
            ops.patch_gather(x, torch.tensor([3, 1])),
        ]
    sum(result.sum() for result in results).backward()
    assert rows.grad is not None and x.grad is not None


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0", "9.0"], (9, 0), True),
        (["8.0+PTX"], (9, 0), True),
        (["12.0+PTX"], (10, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 1), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_the_machine_code_runs_on(archs: list[str], capability: tuple[int, int], fits: bool) -> None:
    assert _library.covers(archs, capability) is fits


def test_a_gpu_that_the_build_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"cuda": ["patch_nce"], "cuda_archs": ["8.0"], "cuda_version": "13.0", "cuda_driver": "13.1"}
    monkeypatch.setattr(_library, "load", lambda: _library.Extension(facts, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choice = _library.choose("patch_nce", "cuda")
    assert not choice.native and "built for 8.0 and this GPU is 9.0; set I2I_DIST_CUDA_ARCHS" in choice.reason
    assert "built without it" in _library.choose("adalin", "cuda").reason
    facts["cuda_driver"] = "12.8"
    _library._choose.cache_clear()
    assert "built with CUDA 13.0 and the driver knows 12.8 at most" in _library.choose("patch_nce", "cuda").reason


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", "fast")
    with pytest.raises(ValueError, match="'fast' is not known; use auto, native or reference"):
        ops.patch_nce_loss(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.usefixtures("missing")
def test_a_missing_kernel_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        RuntimeWarning, match="op runs its slower reference .* on cpu: the extension is not built; build"
    ):
        _library.use_native("op", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.use_native("op", "cpu")
        _library.use_native("op", "cuda")
    monkeypatch.setenv("I2I_DIST_OPS", "native")
    with pytest.raises(ValueError, match="the extension is not built; build it with `pip install"):
        _library.use_native("op", "cpu")


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
