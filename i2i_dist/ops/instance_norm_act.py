"""Instance norm with an activation and a residual in one op: where these generators spend the time of their norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from i2i_dist.ops import _library, reference
from i2i_dist.ops._maps import activation_of, check_map, like, statistics_dtype
from i2i_dist.ops.reference import SLOPES


def instance_norm_act(
    x: Tensor, *, eps: float = 1e-5, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return `act((x - mean) / sqrt(variance + eps)) + residual`, over the pixels of every channel of every image.

    No affine map, no running statistics, the biased variance. Statistics and arithmetic are fp32 or better, with one
    rounding at the end.

    Args:
        x: `[N, C, H, W]`, fp16, bf16, fp32 or fp64, of more than one pixel.
        eps: Added to the variance, > 0.
        activation: `"none"`, `"relu"` or `"leaky_relu"` (slope 0.2).
        residual: Like `x`; added after everything else.

    Returns:
        `[N, C, H, W]` in the dtype and memory format of `x`.

    Raises:
        ValueError: For shapes, dtypes, devices or numbers that do not fit together.

    Source: Ulyanov et al. 2016, equation 4.
    """
    check_map("instance_norm_act", x, residual, activation, eps)
    if x.size(2) * x.size(3) < 2:
        raise ValueError(f"x has shape {list(x.shape)}: the instance norm of one pixel is 0; use larger maps.")
    if not _library.use_native("instance_norm_act", x.device.type):
        return reference.instance_norm_act(x, eps=eps, activation=activation, residual=residual)
    x = like(x, x)
    residual = None if residual is None else like(residual, x)
    y: Tensor
    y, _ = torch.ops.i2i_dist.instance_norm_act(x, residual, eps, SLOPES[activation])
    return y


def _fake(x: Tensor, residual: Tensor | None, eps: float, slope: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:2], 2, dtype=statistics_dtype(x))


def _fake_backward(grad: Tensor, x: Tensor, statistics: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, ctx.eps, ctx.slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the statistics' gradient would be filled with zeros
    ctx.save_for_backward(x, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    x, statistics = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0] and torch.is_grad_enabled():
        # To be differentiated again, which only the definition can be; as a view, so that autograd stops at it.
        x = x.view_as(x)
        y = reference.instance_norm_act(x, eps=ctx.eps, activation=activation_of(ctx.slope))
        (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    elif ctx.needs_input_grad[0]:
        grad_x = torch.ops.i2i_dist.instance_norm_act_backward(like(grad, x), x, statistics, ctx.slope)
    return grad_x, grad if ctx.needs_input_grad[1] else None, None, None


if _library.load().problem is None:
    register_fake("i2i_dist::instance_norm_act", _fake)
    register_fake("i2i_dist::instance_norm_act_backward", _fake_backward)
    register_autograd("i2i_dist::instance_norm_act", _backward, setup_context=_setup)
