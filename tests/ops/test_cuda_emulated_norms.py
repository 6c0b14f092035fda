"""The CUDA norms, emulated, against their definition in fp64 and its autograd."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from i2i_dist.ops import reference
from tests.ops import emulated

EPS = 1e-5
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
pytestmark = pytest.mark.usefixtures("where")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS = {slope: name for name, slope in reference.SLOPES.items()}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


class Case(NamedTuple):
    """A map and how it is normalised. `mean` is added to x; `rho` is None for one in [0, 1] for every channel."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    slope: float = 0.2
    residual: bool = True
    unbiased: bool = True
    mean: float = 0.0
    rho: float | None = None
    seed: int = 0


class Data(NamedTuple):
    """The tensors of a case; gamma, beta and rho are None for instance_norm_act."""

    x: Tensor
    residual: Tensor | None
    grad: Tensor
    parameters: tuple[Tensor, ...]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make(case: Case, adalin: bool) -> Data:
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    images, channels = case.shape[:2]
    x, residual, grad = (random(*case.shape) for _ in range(3))
    x = (x + case.mean * (1 + random(1, channels, 1, 1) / 100)).to(case.dtype)
    rho = torch.rand(channels, generator=generator) if case.rho is None else torch.full((channels,), case.rho)
    exact = [t.to(statistics_dtype(case.dtype)) for t in (random(images, channels), random(images, channels), rho)]
    parameters = tuple(exact) if adalin else ()
    # Near the kink of the activation, rounding alone decides which slope a gradient meets: none arrives there.
    value = define(case, x.double(), [p.double() for p in parameters], None, 1.0)
    grad[value.abs() < (0.05 if case.mean else 1e-3)] = 0
    memory_format = LAYOUTS[case.channels_last]
    x, residual, grad = (t.to(case.dtype).to(memory_format=memory_format) for t in (x, residual, grad))
    return Data(x, residual if case.residual else None, grad, parameters)


def define(case: Case, x: Tensor, parameters: list[Tensor], residual: Tensor | None, slope: float) -> Tensor:
    activation = ACTIVATIONS[slope]
    if not parameters:
        return reference.instance_norm_act(x, eps=EPS, activation=activation, residual=residual)
    return reference.adalin(x, *parameters, eps=EPS, unbiased=case.unbiased, activation=activation, residual=residual)


def by_definition(case: Case, data: Data, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return y and the gradients of x and the parameters, computed in `dtype` or as the reference would."""
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (data.x, *data.parameters)]
    residual = None if data.residual is None else data.residual.to(dtype or data.residual.dtype)
    y = define(case, leaves[0], leaves[1:], residual, case.slope)
    return [y.detach(), *torch.autograd.grad(y, leaves, data.grad.to(y.dtype))]


def by_kernel(case: Case, data: Data, seed: int = 0, late: bool = False) -> list[Tensor]:
    """Return the same from the emulated kernels."""
    with emulated.schedule(seed, late) as ops:
        x, residual, grad, parameters = data
        if not parameters:
            y, statistics = ops.instance_norm_act(x, residual, EPS, case.slope)
            return [y, ops.instance_norm_act_backward(grad, x, statistics, case.slope)]
        y, *statistics = ops.adalin(x, *parameters, residual, EPS, case.unbiased, case.slope)
        return [y, *ops.adalin_backward(grad, x, *parameters, *statistics, case.unbiased, case.slope)]


def compare(case: Case, seed: int = 0, late: bool = False) -> None:
    """Hold both norms to twice the reference's error, or 8 ulp of the largest value.

    The gradients of the parameters are sums that may cancel: 4 ulp of what their terms add up to will do for them.
    """
    for adalin in (True, False):
        data = make(case, adalin)
        results = by_kernel(case, data, seed, late)
        plain, exact = by_definition(case, data), by_definition(case, data, torch.float64)
        terms = data.grad.double().abs().sum((0, 2, 3)) * max([1.0, *(p.abs().max().item() for p in data.parameters)])
        for i, name in enumerate(("y", "grad_x", "grad_gamma", "grad_beta", "grad_rho")[: len(results)]):
            assert results[i].dtype == plain[i].dtype and results[i].shape == plain[i].shape
            # In fp64 the definition has an error of its own, that is not known.
            ulps = 16 if case.dtype == torch.float64 else 8
            allowed = max(2 * distance(plain[i], exact[i]), ulps * ulp(exact[i], plain[i].dtype))
            if i > 1:
                allowed = max(allowed, 4 * ulp(terms, plain[i].dtype))
            error = distance(results[i], exact[i])
            assert error <= allowed, f"{case}, {adalin=}: {name} is off by {error}, more than {allowed}"
        for result in results[:2]:
            assert result.is_contiguous(memory_format=LAYOUTS[case.channels_last])


def distance(result: Tensor, exact: Tensor) -> float:
    error = (result.double() - exact).abs().max().item()
    return math.inf if math.isnan(error) else error


def ulp(exact: Tensor, dtype: torch.dtype) -> float:
    largest = max(exact.abs().max().item(), torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))


# One pixel, fewer than a vector, odd planes that begin between vectors, more than one block of pixels; one, few and
# many channels, in vectors or not.
SHAPES = [
    (3, 5, 1, 3),
    (1, 3, 5, 7),
    (3, 8, 7, 9),
    (1, 64, 5, 7),
    (2, 1, 1, 257),
    (1, 3, 25, 41),
    (1, 24, 27, 19),
]


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes_and_dtypes(shape: tuple[int, int, int, int], channels_last: bool, dtype: torch.dtype) -> None:
    compare(Case(shape, dtype, channels_last))


# Both sides of: a split and two of a plane, the largest plane in registers, a split of pixels.
@pytest.mark.parametrize(
    ("shape", "dtype", "channels_last"),
    [
        ((1, 1, 1, 8191), torch.float32, False),
        ((1, 2, 1, 8192), torch.float32, False),
        ((1, 2, 1, 8193), torch.float32, False),
        ((1, 1, 1, 16383), torch.bfloat16, False),
        ((1, 2, 1, 16385), torch.bfloat16, False),
        ((1, 2, 1, 4097), torch.float64, False),
        ((1, 1, 128, 128), torch.float32, False),
        ((1, 1, 1, 16389), torch.float32, False),
        ((1, 1, 1, 32777), torch.float16, False),
        ((1, 16, 1, 256), torch.float16, True),
        ((1, 16, 1, 257), torch.float16, True),
        ((2, 3, 1, 513), torch.float32, True),
        ((1, 72, 1, 40), torch.float16, True),
        ((1, 37, 1, 40), torch.float32, True),
    ],
    ids=str,
)
def test_both_sides_of_every_threshold(
    shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    compare(Case(shape, dtype, channels_last))


def test_more_splits_than_a_block_has_rows_for() -> None:
    compare(Case((1, 1, 1, 33 * 256 + 5), channels_last=True))


def test_many_planes_that_no_block_can_hold() -> None:
    case = Case((1, 128, 1, 16389), slope=0.0, residual=False)
    x = make(case, adalin=False).x
    with emulated.schedule(0, False) as ops:
        y, statistics = ops.instance_norm_act(x, None, EPS, 0.0)
        grad_x = ops.instance_norm_act_backward(y, x, statistics, 0.0)
    some = [0, 77, 127]
    data = Data(x[:, some], None, y[:, some], ())
    exact_y, exact_grad = by_definition(case, data, torch.float64)
    assert distance(y[:, some], exact_y) <= 8 * ulp(exact_y, torch.float32)
    assert distance(grad_x[:, some], exact_grad) <= 8 * ulp(exact_grad, torch.float32)


@every_layout
@pytest.mark.parametrize("slope", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0, None])
def test_options(channels_last: bool, slope: float, residual: bool, unbiased: bool, rho: float | None) -> None:
    for seed in (0, 1):
        compare(Case((2, 4, 3, 5), torch.float32, channels_last, slope, residual, unbiased, 0.0, rho, seed))


@every_layout
def test_one_pixel(channels_last: bool) -> None:
    compare(Case((3, 5, 1, 1), channels_last=channels_last, unbiased=False))
    compare(Case((2, 1, 1, 1), channels_last=channels_last, unbiased=False))


@every_layout
@pytest.mark.parametrize("shape", [(2, 3, 65, 64), (1, 8, 33, 31), (1, 2, 1, 20001)], ids=str)
def test_means_far_above_the_deviation(shape: tuple[int, int, int, int], channels_last: bool) -> None:
    for seed in (0, 1, 2):
        compare(Case(shape, channels_last=channels_last, mean=1e4, seed=seed))


@every_layout
def test_the_first_pixel_may_be_an_outlier(channels_last: bool) -> None:
    case = Case((1, 2, 40, 41), channels_last=channels_last)
    for adalin in (True, False):
        data = make(case, adalin)
        data.x[:, :, 0, 0] = 3e3
        result, exact = by_kernel(case, data)[0], by_definition(case, data, torch.float64)[0]
        assert distance(result, exact) <= 8 * ulp(exact, torch.float32)


@every_layout
def test_constant_planes_and_gradients(channels_last: bool) -> None:
    x = torch.full((2, 8, 9, 11), 0.7).to(memory_format=LAYOUTS[channels_last])
    beta = torch.arange(16.0).view(2, 8) - 5
    with emulated.schedule(0, False) as ops:
        y, *statistics = ops.adalin(x, torch.ones(2, 8), beta, torch.full((8,), 0.5), None, EPS, True, 0.2)
        assert y.equal(torch.where(beta > 0, beta, 0.2 * beta)[..., None, None].expand_as(y))
        normalised, instance = ops.instance_norm_act(x, None, EPS, 1.0)
        assert normalised.eq(0).all() and instance.equal(statistics[0])
        # The norm removes what is constant; from powers of 2, no rounding is left.
        grad_x = ops.instance_norm_act_backward(torch.full_like(x, 0.5), x, instance, 1.0)
        assert grad_x.eq(0).all()


@every_layout
def test_parameters_at_any_stride(channels_last: bool) -> None:
    case = Case((3, 4, 5, 3), channels_last=channels_last)
    data = make(case, adalin=True)
    rows, pairs = torch.randn(1, 4), torch.randn(4, 6)
    gamma, beta, rho = rows.expand(3, 4), pairs.mT[::2], torch.rand(4, 3)[:, 1]
    assert gamma.stride() == (0, 1) and beta.stride() == (2, 6) and rho.stride() == (3,)
    strided = by_kernel(case, data._replace(parameters=(gamma, beta, rho)))
    dense = by_kernel(case, data._replace(parameters=(gamma.contiguous(), beta.contiguous(), rho.contiguous())))
    assert all(a.equal(b) for a, b in zip(strided, dense, strict=True))


@every_dtype
@every_layout
def test_maps_that_begin_between_vectors(channels_last: bool, dtype: torch.dtype) -> None:
    case = Case((2, 8, 3, 7), dtype, channels_last)
    for adalin in (True, False):
        data = make(case, adalin)
        x, residual, grad = (between_vectors(t) for t in (data.x, data.residual, data.grad))
        shifted = by_kernel(case, Data(x, residual, grad, data.parameters))
        assert all(a.equal(b) for a, b in zip(shifted, by_kernel(case, data), strict=True))


def between_vectors(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    shifted = memory[1:].as_strided(tensor.shape, tensor.stride())
    return shifted.copy_(tensor)


def test_residual_and_gradient_in_the_other_layout() -> None:
    case = Case((2, 8, 3, 7), channels_last=True)
    for adalin in (True, False):
        data = make(case, adalin)
        assert data.residual is not None
        other = data._replace(residual=data.residual.contiguous(), grad=data.grad.contiguous())
        assert all(a.equal(b) for a, b in zip(by_kernel(case, other), by_kernel(case, data), strict=True))


@every_layout
def test_every_image_by_itself(channels_last: bool) -> None:
    case = Case((3, 8, 9, 31), channels_last=channels_last)
    for adalin in (True, False):
        data = make(case, adalin)
        together = by_kernel(case, data)
        for image in range(3):
            parts = [None if t is None else t[image : image + 1] for t in data[:3]]
            parameters = tuple(p[image : image + 1] if p.dim() == 2 else p for p in data.parameters)
            alone = by_kernel(case, Data(*parts, parameters))  # type: ignore[arg-type]
            assert all(a.equal(b[image : image + 1]) for a, b in zip(alone[:2], together[:2], strict=True))


@pytest.mark.parametrize(("seed", "late"), emulated.SCHEDULES)
@pytest.mark.parametrize("check", ["planes", "pixels", "splits"])
def test_every_schedule(check: str, seed: int, late: bool) -> None:
    {"planes": check_planes, "pixels": check_pixels, "splits": check_splits}[check](seed, late)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 25, 41)),
        Case((1, 1, 1, 16387)),
        Case((2, 8, 25, 41), channels_last=True),
        Case((1, 3, 25, 41), torch.bfloat16, channels_last=True),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_threads(case: Case) -> None:
    for adalin in (True, False):
        data = make(case, adalin)
        first = by_kernel(case, data)
        for seed in (1, 2):
            again = by_kernel(case, data, seed, late=True)
            assert all(a.equal(b) for a, b in zip(again, first, strict=True))


def test_refusals() -> None:
    x, row = torch.zeros(2, 3, 4, 4), torch.zeros(3)
    plane = torch.zeros(2, 3)
    with emulated.schedule(0, False) as ops:
        with pytest.raises(ValueError, match="x has strides"):
            ops.instance_norm_act(x[..., ::2], None, EPS, 0.0)
        with pytest.raises(ValueError, match="residual has shape"):
            ops.instance_norm_act(x, x[:1], EPS, 0.0)
        with pytest.raises(ValueError, match="gamma has shape"):
            ops.adalin(x, row, plane, row, None, EPS, True, 0.0)
        with pytest.raises(ValueError, match="rho has shape"):
            ops.adalin(x, plane, plane, plane, None, EPS, True, 0.0)
        with pytest.raises(ValueError, match="grad has shape"):
            ops.instance_norm_act_backward(x.double(), x, torch.zeros(2, 3, 2), 0.0)
        with pytest.raises(ValueError, match="statistics has shape"):
            ops.instance_norm_act_backward(x, x, plane, 0.0)


def check_planes(seed: int = 0, late: bool = True) -> None:
    compare(Case((2, 3, 25, 41)), seed, late)
    compare(Case((1, 5, 9, 7), torch.bfloat16, mean=100.0), seed, late)
    compare(Case((2, 3, 5, 7), torch.float64), seed, late)


def check_pixels(seed: int = 0, late: bool = True) -> None:
    compare(Case((2, 8, 25, 41), channels_last=True, mean=100.0), seed, late)
    compare(Case((3, 37, 9, 7), torch.float16, channels_last=True), seed, late)


def check_splits(seed: int = 0, late: bool = True) -> None:
    compare(Case((1, 2, 1, 16403), mean=10.0), seed, late)
    compare(Case((1, 3, 1, 1300), channels_last=True), seed, late)
