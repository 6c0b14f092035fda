"""What the ops on feature maps `[N, C, H, W]` share: checks of their arguments, memory formats, activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from i2i_dist.ops.reference import SLOPES

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_map(op: str, x: Tensor, residual: Tensor | None, activation: str, eps: float) -> None:
    """Refuse what the norms cannot work on.

    Raises:
        ValueError: With what was given and what is allowed.
    """
    if x.dim() != 4 or x.dtype not in FLOATING or x.numel() == 0:
        raise ValueError(
            f"{op} was given x of shape {list(x.shape)} and {x.dtype}; it must be [N, C, H, W], not empty, and fp16, "
            f"bf16, fp32 or fp64."
        )
    if activation not in SLOPES:
        raise ValueError(f"activation {activation!r} is not known to {op}; use one of {', '.join(SLOPES)}.")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps={eps} must be > 0 and finite: {op} divides by the root of variance + eps.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual has shape {list(residual.shape)}, {residual.dtype}, {residual.device}; it is added to the "
            f"output of {op}, so it must be like x: {list(x.shape)}, {x.dtype}, {x.device}."
        )


def activation_of(slope: float) -> str:
    """Return the name of the activation with this slope for negative values."""
    for name, known in SLOPES.items():
        if known == slope:
            return name
    raise ValueError(f"slope={slope} belongs to no activation; known are {SLOPES}.")


def memory_format(x: Tensor) -> torch.memory_format:
    """Return `channels_last` for a map that is dense in that layout alone, and else `contiguous_format`."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def like(other: Tensor, x: Tensor) -> Tensor:
    """Return `other` in the memory format of `x`, itself if it is there already."""
    return other.contiguous(memory_format=memory_format(x))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that statistics of `x` are kept in: fp64 for fp64, else fp32."""
    return torch.promote_types(x.dtype, torch.float32)
