"""The CPU kernels that gather patches and put their gradients back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist import ops
from i2i_dist.ops import reference

pytestmark = pytest.mark.skipif("patch_gather" not in ops.build_info()["cpu"], reason="the extension is not built")

native = torch.ops.i2i_dist
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Two images of 37 channels and 5 x 7 places; one channel; one place; enough for several threads.
SHAPES = [(2, 37, 5, 7), (3, 1, 4, 4), (2, 16, 1, 1), (2, 70, 40, 33)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_ids(count: int, places: int) -> Tensor:
    """Some more than once, if there are more of them than places."""
    return torch.randint(places, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gathers_the_same_bits(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    features = draw(shape, dtype).to(memory_format=layout)
    ids = draw_ids(23, shape[2] * shape[3])
    patches = native.patch_gather(features, ids)
    assert patches.is_contiguous() and patches.dtype == dtype
    assert torch.equal(patches, reference.patch_gather(features, ids))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format) -> None:
    ids = draw_ids(23, shape[2] * shape[3])
    grad = draw((shape[0], 23, shape[1]), dtype)
    ours = native.patch_gather_backward(grad, ids, shape[2], shape[3], layout == torch.channels_last)
    assert ours.shape == shape and ours.dtype == dtype and ours.is_contiguous(memory_format=layout)
    exact = torch.zeros(shape, dtype=torch.float64).flatten(2).index_add(2, ids, grad.mT.double()).view(shape)
    # Sums of a place are rounded once in the lower precisions, and at every addition in fp32 and fp64.
    rounding = torch.finfo(dtype).eps * (1 if dtype in (torch.bfloat16, torch.float16) else 23)
    torch.testing.assert_close(ours.double(), exact, rtol=rounding / 2 + 1e-6 * (dtype != torch.float64), atol=1e-6)
    assert torch.equal(ours != 0, exact != 0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_repeated_ids_are_added_in_their_order(channels_last: bool) -> None:
    """1 survives only if it is added after the great numbers have cancelled."""
    grad = torch.tensor([1e8, 5.0, -1e8, 1.0]).view(1, 4, 1).expand(1, 4, 3)
    out = native.patch_gather_backward(grad, torch.tensor([2, 0, 2, 2]), 1, 4, channels_last)
    assert torch.equal(out, torch.tensor([5.0, 0.0, 1.0, 0.0]).expand(1, 3, 1, 4))


def test_no_ids() -> None:
    ids = torch.empty(0, dtype=torch.long)
    assert native.patch_gather(draw((2, 3, 4, 5)), ids).shape == (2, 0, 3)
    gradient = native.patch_gather_backward(torch.empty(2, 0, 3), ids, 4, 5, False)
    assert torch.equal(gradient, torch.zeros(2, 3, 4, 5))


def test_ids_and_gradients_at_any_stride() -> None:
    features, ids = draw((2, 3, 4, 5)), torch.tensor([[3, -1], [19, -1], [3, -1]])[:, 0]
    assert torch.equal(native.patch_gather(features, ids), reference.patch_gather(features, ids.contiguous()))
    grad = draw((2, 3, 3)).mT
    strided, plain = (native.patch_gather_backward(x, ids, 4, 5, False) for x in (grad, grad.contiguous()))
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads(layout: torch.memory_format) -> None:
    shape, ids = (2, 70, 40, 33), draw_ids(3000, 1320)
    features, grad = draw(shape).to(memory_format=layout), draw((2, 3000, 70))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            back = native.patch_gather_backward(grad, ids, 40, 33, layout == torch.channels_last)
            results.append((native.patch_gather(features, ids), back))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MAP, IDS = torch.ones(2, 3, 4, 5), torch.tensor([0, 19])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": MAP[0]}, r"features has shape \[3, 4, 5\]"),
        ({"features": MAP[:0]}, "not empty"),
        ({"features": MAP.long()}, "floating point"),
        ({"features": MAP.mT}, "contiguous or channels_last"),
        ({"ids": torch.tensor([0, 20])}, r"ids\[1\] is 20; the map has the places 0 to 19"),
        ({"ids": torch.tensor([-1])}, r"ids\[0\] is -1"),
        ({"ids": IDS[None]}, r"ids has shape \[1, 2\]"),
        ({"ids": IDS.int()}, "Int"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        native.patch_gather(**{"features": MAP, "ids": IDS, **change})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"grad": torch.ones(2, 2)}, r"grad has shape \[2, 2\]"),
        ({"grad": torch.ones(2, 3, 3)}, r"it must be \[N, 2, C\]"),
        ({"grad": torch.ones(2, 2, 3).long()}, "floating point"),
        ({"height": 0}, "map of 0 x 5"),
        ({"ids": torch.tensor([0, 20])}, r"ids\[1\] is 20"),
        ({"ids": torch.tensor([0, -2])}, r"ids\[1\] is -2"),
        ({"ids": IDS.int()}, "Int"),
    ],
)
def test_bad_gradients_are_refused(change: dict[str, Any], sentence: str) -> None:
    good = {"grad": torch.ones(2, 2, 3), "ids": IDS, "height": 4, "width": 5, "channels_last": False}
    with pytest.raises(ValueError, match=sentence):
        native.patch_gather_backward(**{**good, **change})
