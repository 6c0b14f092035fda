"""Features sampled by location, with a gradient that writes the map once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from i2i_dist.ops import _library, reference
from i2i_dist.ops._maps import FLOATING, like, memory_format


def patch_gather(features: Tensor, ids: Tensor) -> Tensor:
    """Sample a feature map at places that all images share.

    Args:
        features: `[N, C, H, W]`, fp16, bf16, fp32 or fp64.
        ids: int64 `[P]` on the same device, each `row * W + column`; one may occur more than once.

    Returns:
        `[N, P, C]` in the dtype of `features`, contiguous.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together; by the CPU kernel also for ids outside of
            the map. On a GPU, where looking at them would cost a wait, such ids end the kernel and with it the
            process's use of the GPU.
    """
    if features.dim() != 4 or features.dtype not in FLOATING or features.numel() == 0:
        raise ValueError(
            f"features have shape {list(features.shape)} and are {features.dtype}; they must be [N, C, H, W], not "
            f"empty, and fp16, bf16, fp32 or fp64."
        )
    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.numel() == 0 or ids.device != features.device:
        raise ValueError(
            f"ids have shape {list(ids.shape)}, {ids.dtype}, {ids.device}; they must be int64 [P], at least one, on "
            f"the device of the features, {features.device}."
        )
    if not _library.use_native("patch_gather", features.device.type):
        return reference.patch_gather(features, ids)
    gathered: Tensor = torch.ops.i2i_dist.patch_gather(like(features, features), ids.contiguous())
    return gathered


def _fake(features: Tensor, ids: Tensor) -> Tensor:
    return features.new_empty(features.size(0), ids.size(0), features.size(1))


def _fake_backward(grad: Tensor, ids: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return grad.new_empty(grad.size(0), grad.size(2), height, width).contiguous(memory_format=layout)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    features, ids = inputs
    ctx.size = features.shape[2:]
    ctx.channels_last = memory_format(features) is torch.channels_last
    ctx.save_for_backward(ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (ids,) = ctx.saved_tensors
    return torch.ops.i2i_dist.patch_gather_backward(grad.contiguous(), ids, *ctx.size, ctx.channels_last), None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return torch.ops.i2i_dist.patch_gather(like(grad, grad), ids), None, None, None, None


if _library.load().problem is None:
    register_fake("i2i_dist::patch_gather", _fake)
    register_fake("i2i_dist::patch_gather_backward", _fake_backward)
    register_autograd("i2i_dist::patch_gather", _backward, setup_context=_setup)
    register_autograd("i2i_dist::patch_gather_backward", _backward_of_backward, setup_context=_setup_backward)
