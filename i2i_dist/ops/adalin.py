"""AdaLIN and ILN: instance and layer norm, mixed for each channel, with the affine map and an activation in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from i2i_dist.ops import _library, reference
from i2i_dist.ops._maps import activation_of, check_map, like, statistics_dtype
from i2i_dist.ops.reference import SLOPES


def adalin(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rho: Tensor,
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Return `act(gamma * (rho * IN(x) + (1 - rho) * LN(x)) + beta) + residual`.

    IN normalises every channel of every image over its pixels, LN every image over its channels and pixels, both as
    (x - mean) / sqrt(variance + eps). Statistics and arithmetic are fp32 or better, with one rounding at the end.

    Args:
        x: `[N, C, H, W]`, fp16, bf16, fp32 or fp64.
        gamma: `[N, C]`, any floating point dtype; a stride may be 0.
        beta: `[N, C]`, likewise.
        rho: `[C]`, likewise; the weight of IN. It is not clamped here.
        eps: Added to the variances, > 0.
        unbiased: Divide the squares by count - 1, as the released code does, instead of by count.
        activation: `"none"`, `"relu"` or `"leaky_relu"` (slope 0.2).
        residual: Like `x`; added after everything else.

    Returns:
        `[N, C, H, W]` in the dtype and memory format of `x`.

    Raises:
        ValueError: For shapes, dtypes, devices or numbers that do not fit together.

    Source: Kim et al. 2020 (U-GAT-IT), equation 1.
    """
    check_map("adalin", x, residual, activation, eps)
    _check_parameters(x, {"gamma": gamma, "beta": beta}, (x.size(0), x.size(1)))
    _check_parameters(x, {"rho": rho}, (x.size(1),))
    if unbiased and x.size(2) * x.size(3) < 2:
        raise ValueError(f"x has shape {list(x.shape)}: one pixel has no unbiased variance; use unbiased=False.")
    if not _library.use_native("adalin", x.device.type):
        return reference.adalin(
            x, gamma, beta, rho, eps=eps, unbiased=unbiased, activation=activation, residual=residual
        )
    exact = statistics_dtype(x)
    gamma, beta, rho = gamma.to(exact), beta.to(exact), rho.to(exact)
    x = like(x, x)
    residual = None if residual is None else like(residual, x)
    y: Tensor
    y, _, _ = torch.ops.i2i_dist.adalin(x, gamma, beta, rho, residual, eps, unbiased, SLOPES[activation])
    return y


def iln(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rho: Tensor,
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Return `adalin` with one gamma and beta `[C]` for all images; everything else is as there."""
    check_map("iln", x, residual, activation, eps)
    _check_parameters(x, {"gamma": gamma, "beta": beta}, (x.size(1),))
    shape = (x.size(0), x.size(1))
    return adalin(
        x,
        gamma.expand(shape),
        beta.expand(shape),
        rho,
        eps=eps,
        unbiased=unbiased,
        activation=activation,
        residual=residual,
    )


def _check_parameters(x: Tensor, parameters: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    for name, value in parameters.items():
        if tuple(value.shape) != shape or not value.is_floating_point() or value.device != x.device:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, {value.dtype}, {value.device}; for x of shape {list(x.shape)} "
                f"on {x.device} it must be {list(shape)} and floating point, on the same device."
            )


def _fake(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rho: Tensor,
    residual: Tensor | None,
    eps: float,
    unbiased: bool,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels = x.shape[:2]
    exact = statistics_dtype(x)
    return torch.empty_like(x), x.new_empty(images, channels, 2, dtype=exact), x.new_empty(images, 2, dtype=exact)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rho: Tensor,
    instance_statistics: Tensor,
    layer_statistics: Tensor,
    unbiased: bool,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact, shape = statistics_dtype(x), x.shape[:2]
    return (
        torch.empty_like(x),
        x.new_empty(shape, dtype=exact),
        x.new_empty(shape, dtype=exact),
        x.new_empty(shape[1], dtype=exact),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, beta, rho, _, ctx.eps, ctx.unbiased, ctx.slope = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or the statistics' gradients would be filled with zeros
    ctx.save_for_backward(x, gamma, beta, rho, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, gamma, beta, rho, instance_statistics, layer_statistics = ctx.saved_tensors
    grad_residual = grad if ctx.needs_input_grad[4] else None
    if not any(ctx.needs_input_grad[:4]):
        return None, None, None, None, grad_residual, None, None, None
    if torch.is_grad_enabled():
        # To be differentiated again, which only the definition can be; as views, so that autograd stops at them.
        x, gamma, beta, rho = (tensor.view_as(tensor) for tensor in (x, gamma, beta, rho))
        y = reference.adalin(
            x, gamma, beta, rho, eps=ctx.eps, unbiased=ctx.unbiased, activation=activation_of(ctx.slope)
        )
        wanted = [tensor for tensor in (x, gamma, beta, rho) if tensor.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        grads = [next(found) if tensor.requires_grad else None for tensor in (x, gamma, beta, rho)]
    else:
        grads = torch.ops.i2i_dist.adalin_backward(
            like(grad, x), x, gamma, beta, rho, instance_statistics, layer_statistics, ctx.unbiased, ctx.slope
        )
    return (*grads, grad_residual, None, None, None)


if _library.load().problem is None:
    register_fake("i2i_dist::adalin", _fake)
    register_fake("i2i_dist::adalin_backward", _fake_backward)
    register_autograd("i2i_dist::adalin", _backward, setup_context=_setup)
