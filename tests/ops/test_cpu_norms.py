"""The CPU kernels of adalin and instance_norm_act, called as raw ops, against the reference in fp64 with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist.ops import _library, reference

pytestmark = pytest.mark.skipif(
    _library.load().problem is not None, reason=_library.load().problem or "the extension is there"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(3, 5, 7, 9), (1, 1, 5, 3), (2, 70, 17, 15), (1, 2, 150, 151), (2, 8, 1, 1), (1, 64, 1, 5), (9, 2, 4, 4)]
EPS = 1e-5


def inputs(shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format, mean: float = 1.0) -> Any:
    """Return x, the parameters (gamma, beta, rho), a residual and a gradient, drawn from the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    draw = [torch.randn(*shape, generator=generator) for _ in range(3)]
    x, residual, grad = (t.to(dtype).contiguous(memory_format=memory_format) for t in (draw[0] + mean, *draw[1:]))
    statistics = torch.promote_types(dtype, torch.float32)
    gamma, beta = torch.randn(2, *shape[:2], generator=generator).to(statistics)
    rho = torch.rand(shape[1], generator=generator).to(statistics)
    rho[::3], rho[1::3] = 0.0, 1.0
    return x, (gamma, beta, rho), residual, grad


def native(name: str, x: Tensor, parameters: Any, residual: Tensor | None, grad: Tensor, slope: float, **options: Any):
    """Run both directions of a raw op: y, grad_x and the gradients of the parameters, if it has some."""
    ops = torch.ops.i2i_dist
    if name == "adalin":
        unbiased = options.get("unbiased", False)
        y, *statistics = ops.adalin(x, *parameters, residual, EPS, unbiased, slope)
        return y, *ops.adalin_backward(grad, x, *parameters, *statistics, unbiased, slope)
    y, statistics = ops.instance_norm_act(x, residual, EPS, slope)
    return y, ops.instance_norm_act_backward(grad, x, statistics, slope)


def expected(
    name: str, x: Tensor, parameters: Any, residual: Tensor | None, grad: Tensor, slope: float, **options: Any
):
    """The same by the reference and autograd, in the dtype of what it is given."""
    activation = {s: a for a, s in reference.SLOPES.items()}[slope]
    leaves = [t.detach().clone().requires_grad_() for t in (x, *(parameters if name == "adalin" else ()))]
    y = getattr(reference, name)(*leaves, eps=EPS, activation=activation, residual=residual, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def doubles(*tensors: Any) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def away_from_the_kink(name: str, x: Tensor, parameters: Any, grad: Tensor, width: float, **options: Any) -> Tensor:
    """Zero `grad` where the normalised value is too near zero to tell its sign."""
    leaves = doubles(x, *(parameters if name == "adalin" else ()))
    return grad * (getattr(reference, name)(*leaves, eps=EPS, **options).abs() > width)


def check(name: str, x: Tensor, parameters: Any, residual: Tensor | None, grad: Tensor, slope: float, **options: Any):
    ours = native(name, x, parameters, residual, grad, slope, **options)
    theirs = expected(name, x, parameters, residual, grad, slope, **options)
    x64, residual64, grad64, *parameters64 = doubles(x, residual, grad, *parameters)
    exact = expected(name, x64, parameters64, residual64, grad64, slope, **options)
    # What a difference that is zero, as every gradient of a single pixel, is a difference of.
    scales = [e.abs().max() for e in exact]
    if name == "adalin":
        scales[4] = max(scales[4], (parameters64[0] * exact[2]).abs().max())
    # In fp64 the truth is the reference itself, with its own rounding.
    ulps = 512 if x.dtype == torch.float64 else 8
    for our, their, truth, scale in zip(ours, theirs, exact, scales, strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        allowed = max(2 * (their.double() - truth).abs().max(), ulps * torch.finfo(our.dtype).eps * scale)
        torch.testing.assert_close(our.double(), truth, rtol=0, atol=allowed.item())
    assert ours[0].stride() == ours[1].stride() == x.stride()


CASES = [("adalin", {"unbiased": True}), ("adalin", {"unbiased": False}), ("instance_norm_act", {})]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape: Any, dtype: Any, memory_format: Any, name: str, options: Any) -> None:
    if shape[2] * shape[3] == 1 and options.get("unbiased"):
        pytest.skip("one value has no unbiased variance")
    x, parameters, residual, grad = inputs(shape, dtype, memory_format)
    grad = away_from_the_kink(name, x, parameters, grad, 1e-4, **options)
    for slope, added in ((0.0, None), (0.2, residual)):
        check(name, x, parameters, added, grad, slope, **options)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_far_above_the_deviation(dtype: Any, memory_format: Any, name: str, options: Any) -> None:
    x, parameters, _, grad = inputs((2, 6, 40, 41), dtype, memory_format, mean=1e4)
    grad = away_from_the_kink(name, x, parameters, grad, 1e-2, **options)
    for slope in (0.0, 1.0):
        check(name, x, parameters, None, grad, slope, **options)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_constant_planes_have_no_deviation(memory_format: Any, name: str, options: Any) -> None:
    x, parameters, _, grad = inputs((2, 4, 9, 11), torch.float32, memory_format)
    x[:, 1] = 12345.678
    y, grad_x, *_ = native(name, x, (parameters[0], parameters[1], torch.ones(4)), None, grad, 1.0, **options)
    expected_value = parameters[1][:, 1] if name == "adalin" else torch.zeros(2)
    assert torch.equal(y[:, 1], expected_value[:, None, None].expand(2, 9, 11))
    assert grad_x.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["adalin", "instance_norm_act"])
def test_what_is_not_finite_spoils_its_own_alone(name: str, memory_format: Any, value: float) -> None:
    x, (gamma, beta, _), _, grad = inputs((2, 5, 6, 7), torch.float32, memory_format)
    x[1, 2, 3, 4] = value
    y, grad_x, *_ = native(name, x, (gamma, beta, torch.full((5,), 0.5)), None, grad, 0.0)
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[1, slice(None) if name == "adalin" else 2] = True
    assert torch.equal(y.isnan(), spoilt)
    assert torch.equal(grad_x.isnan(), spoilt)


@pytest.mark.parametrize("name", ["adalin", "instance_norm_act"])
def test_any_strides_but_those_of_x(name: str) -> None:
    x, (gamma, beta, rho), residual, grad = inputs((3, 5, 8, 6), torch.float32, torch.contiguous_format)
    expanded = (gamma[:1].expand(3, 5), beta.mT.contiguous().mT, rho.repeat_interleave(2)[::2])
    for layout in FORMATS:
        other = FORMATS[1 - FORMATS.index(layout)]
        there = x.contiguous(memory_format=layout)
        plain = native(name, there, [p.contiguous() for p in expanded], residual, grad, 0.2)
        strided = native(name, there, expanded, residual.contiguous(memory_format=other), grad.mT.contiguous().mT, 0.2)
        crossed = native(name, there, expanded, residual, grad.contiguous(memory_format=other), 0.2)
        for one, two, three in zip(plain, strided, crossed, strict=True):
            assert torch.equal(one, two) and torch.equal(one, three) and one.stride() == two.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["adalin", "instance_norm_act"])
@pytest.mark.parametrize("shape", [(1, 3, 190, 200), (20, 8, 30, 30), (1, 256, 32, 32)])
def test_threads_and_reruns_change_no_bit(shape: Any, name: str, memory_format: Any) -> None:
    x, parameters, residual, grad = inputs(shape, torch.float32, memory_format)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(native(name, x, parameters, residual, grad, 0.2))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_bad_input_is_refused() -> None:
    x, (gamma, beta, rho), residual, grad = inputs((2, 4, 6, 5), torch.float32, torch.contiguous_format)
    ops = torch.ops.i2i_dist
    adalin, norm = ops.adalin, ops.instance_norm_act
    _, instance, layer = adalin(x, gamma, beta, rho, None, EPS, True, 0.0)
    for call, argument in (
        (lambda: norm(x[0], None, EPS, 0.0), "x has shape"),
        (lambda: norm(x.int(), None, EPS, 0.0), "x has shape"),
        (lambda: norm(x[:0], None, EPS, 0.0), "x has shape"),
        (lambda: norm(x[..., ::2], None, EPS, 0.0), "x has strides"),
        (lambda: norm(x, residual[:1], EPS, 0.0), "residual"),
        (lambda: norm(x, residual.double(), EPS, 0.0), "residual"),
        (lambda: ops.instance_norm_act_backward(grad[:1], x, instance, 0.0), "grad"),
        (lambda: ops.instance_norm_act_backward(grad, x, instance[:1], 0.0), "statistics"),
        (lambda: adalin(x, gamma[:1], beta, rho, None, EPS, True, 0.0), "gamma"),
        (lambda: adalin(x, gamma, beta.half(), rho, None, EPS, True, 0.0), "beta"),
        (lambda: adalin(x, gamma, beta, rho[:1], None, EPS, True, 0.0), "rho"),
        (lambda: adalin(x, gamma, beta, rho, residual[:1], EPS, True, 0.0), "residual"),
        (lambda: ops.adalin_backward(grad.half(), x, gamma, beta, rho, instance, layer, True, 0.0), "grad"),
        (lambda: ops.adalin_backward(grad, x, gamma, beta, rho, layer, layer, True, 0.0), "instance_statistics"),
        (lambda: ops.adalin_backward(grad, x, gamma, beta, rho, instance, instance, True, 0.0), "layer_statistics"),
    ):
        with pytest.raises(ValueError, match=f"^{argument}"):
            call()
