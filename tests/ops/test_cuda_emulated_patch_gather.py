"""The CUDA gather, emulated, against its definition and the definition's autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from i2i_dist.ops import reference
from tests.ops import emulated

pytestmark = pytest.mark.usefixtures("where")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# [N, C, H, W] and ids. Vectors along the innermost dimension in one layout, in both and in none; more than one block;
# duplicates close together and far apart.
CASES = [
    ((1, 1, 1, 1), [0]),
    ((2, 5, 3, 7), [20, 3, 3, 0, 3]),
    ((3, 16, 4, 8), [7]),
    ((2, 40, 5, 3), list(range(14, -1, -1))),
    ((1, 3, 16, 17), [7 * i % 272 for i in range(25)] * 3),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_case = pytest.mark.parametrize(("shape", "places"), CASES, ids=lambda case: "x".join(map(str, case))[:11])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare_forward(shape: tuple[int, ...], places: list[int], dtype: torch.dtype, seed: int, late: bool) -> None:
    for layout in LAYOUTS:
        with emulated.schedule(seed, late) as ops:
            features = random(*shape, dtype=dtype).to(memory_format=layout)
            ids = torch.tensor(places)
            out = ops.patch_gather(features, ids)
        assert out.is_contiguous()
        assert out.equal(reference.patch_gather(features, ids))


def compare_backward(shape: tuple[int, ...], places: list[int], dtype: torch.dtype, seed: int, late: bool) -> None:
    images, channels, height, width = shape
    for channels_last in (False, True):
        with emulated.schedule(seed, late) as ops:
            grad = random(images, len(places), channels, dtype=dtype, seed=1)
            ids = torch.tensor(places)
            out = ops.patch_gather_backward(grad, ids, height, width, channels_last)
        assert out.is_contiguous(memory_format=LAYOUTS[channels_last])
        # Duplicates are summed in fp32, fp64 for fp64, one after the other, and rounded once.
        exact = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        reference.patch_gather(exact, ids).backward(grad.to(exact.dtype))
        assert exact.grad is not None and out.equal(exact.grad.to(dtype))


@every_dtype
@every_case
def test_forward(shape: tuple[int, ...], places: list[int], dtype: torch.dtype) -> None:
    compare_forward(shape, places, dtype, seed=0, late=False)


@every_dtype
@every_case
def test_backward(shape: tuple[int, ...], places: list[int], dtype: torch.dtype) -> None:
    compare_backward(shape, places, dtype, seed=0, late=False)


@pytest.mark.parametrize(("seed", "late"), emulated.SCHEDULES)
def test_every_schedule(seed: int, late: bool) -> None:
    check_forward(seed, late)
    check_backward(seed, late)


def test_a_map_that_begins_between_vectors() -> None:
    with emulated.schedule(0, False) as ops:
        memory = random(2 * 4 * 3 * 16 + 1, dtype=torch.float32)
        features = memory[1:].view(2, 4, 3, 16).permute(0, 3, 1, 2)
        ids = torch.tensor([11, 0, 5])
        out = ops.patch_gather(features, ids)
    assert out.equal(reference.patch_gather(features, ids))


def test_no_ids() -> None:
    with emulated.schedule(0, False) as ops:
        ids = torch.empty(0, dtype=torch.long)
        out = ops.patch_gather(torch.zeros(2, 3, 4, 5), ids)
        assert out.shape == (2, 0, 3)
        assert ops.patch_gather_backward(out, ids, 4, 5, True).equal(torch.zeros(2, 3, 4, 5))


def test_strided_ids_and_gradients() -> None:
    with emulated.schedule(0, False) as ops:
        ids = torch.tensor([[11, 0], [5, 0], [5, 0]])[:, 0]
        grad = random(2, 5, 3, dtype=torch.float32).mT
        out = ops.patch_gather_backward(grad, ids, 3, 4, False)
        assert out.equal(ops.patch_gather_backward(grad.contiguous(), ids.contiguous(), 3, 4, False))
        assert ops.patch_gather(out, ids).equal(ops.patch_gather(out, ids.contiguous()))


@pytest.mark.parametrize("place", [-1, 12])
def test_an_id_outside_the_map_ends_the_kernel(place: int, where: str) -> None:
    if where == "cuda":
        pytest.skip("on a GPU it also ends the process's use of it")
    with emulated.schedule(0, False) as ops:
        ids = torch.tensor([0, place])
        with pytest.raises(RuntimeError, match="__trap"):
            ops.patch_gather(torch.zeros(1, 2, 3, 4), ids)
        with pytest.raises(RuntimeError, match="__trap"):
            ops.patch_gather_backward(torch.zeros(1, 2, 2), ids, 3, 4, False)


def test_refusals() -> None:
    features, ids = torch.zeros(1, 2, 3, 4), torch.tensor([0, 1])
    with emulated.schedule(0, False) as ops:
        with pytest.raises(ValueError, match="features has strides"):
            ops.patch_gather(features[..., ::2], ids)
        with pytest.raises(ValueError, match=r"ids has shape .*; it must be \[P\], Long"):
            ops.patch_gather(features, ids.int())
        with pytest.raises(ValueError, match=r"grad has shape .*; it must be \[N, 2, C\]"):
            ops.patch_gather_backward(torch.zeros(1, 3, 2), ids, 3, 4, False)


def check_forward(seed: int = 0, late: bool = True) -> None:
    for (shape, places), dtype in product(CASES, (torch.float16, torch.float64)):
        compare_forward(shape, places, dtype, seed, late)


def check_backward(seed: int = 0, late: bool = True) -> None:
    for (shape, places), dtype in product(CASES, (torch.float16, torch.float64)):
        compare_backward(shape, places, dtype, seed, late)
