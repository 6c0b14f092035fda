"""Batch norm over the global batch: what all ranks together hold is normalised as one process would do it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

Statistics = Literal["batch", "image", "running"]


class BatchNorm(nn.Module):
    """Batch norm with weight and bias, whose statistics cover the batches of all ranks.

    Which statistics are used is the caller's word, never that of `train()` and `eval()`:

    * `"batch"`: those of the global batch. Collective: every rank calls it equally often, in the same order. The
      running statistics move a tenth of the way, the variance unbiased, unless the batch holds a number that is not
      finite: such an update is dropped, and must not be remembered.
    * `"image"`: those of each image alone, which is what `"batch"` means at batch 1.
    * `"running"`: those gathered in training.

    Statistics and arithmetic are in fp32 at least; the output has the dtype of the input. Gradients of second order are
    there on one rank only.

    Args:
        channels: Channels of the input.

    Source: Ioffe and Szegedy 2015.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum = 0.1
    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, statistics: Statistics = "batch") -> Tensor:
        """Normalise `x`.

        Args:
            x: `[N, C, H, W]`; for `"batch"` of the same shape on every rank.
            statistics: Which statistics.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: For other `statistics`; or if they would be those of a single value, which has no variance.
        """
        if statistics not in get_args(Statistics):
            raise ValueError(f"statistics {statistics!r} are not known; use one of {', '.join(get_args(Statistics))}.")
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if statistics == "running":
            mean, variance = self.running_mean.to(dtype), self.running_var.to(dtype)
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)
        values = x[0, 0].numel() * (len(x) * _world() if statistics == "batch" else 1)
        if values < 2:
            raise ValueError(
                "batch norm was given one value of each channel, which has no variance; use larger images."
            )
        if statistics == "image":
            return F.instance_norm(x, weight=weight, bias=bias, eps=self.eps)
        if _world() == 1:
            mean, unbiased = torch.zeros_like(weight), torch.ones_like(weight)
            normalised = F.batch_norm(x, mean, unbiased, weight, bias, training=True, momentum=1.0, eps=self.eps)
        else:
            normalised, mean, variance = _GlobalBatchNorm.apply(x, weight, bias, self.eps)  # type: ignore[no-untyped-call]
            unbiased = variance * (values / (values - 1))
        self._remember(mean, unbiased)
        return normalised

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        finite = torch.isfinite(mean).all() & torch.isfinite(unbiased).all()
        for buffer, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            buffer.copy_(torch.where(finite, buffer.lerp(value.to(buffer.dtype), self.momentum), buffer))


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalises by the moments of all ranks' batches, which have the same shape; one collective each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        exact = x.to(weight.dtype)
        mean, variance = _global_moments(exact)
        inverse = (variance + eps).rsqrt()
        # Taking the mean away first keeps the digits that a large mean would cost.
        normalised = (exact - mean[:, None, None]).mul_((inverse * weight)[:, None, None]).add_(bias[:, None, None])
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return normalised.to(x.dtype), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        normalised = (x.to(weight.dtype) - mean[:, None, None]).mul_(inverse[:, None, None])
        # A rank's own sums are its gradients of bias and weight; those of all ranks act through mean and variance.
        own = torch.stack([gradient.sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))])  # [2, C]
        every = own.clone()
        distributed.all_reduce(every)
        every /= x[:, 0].numel() * _world()
        to_x = gradient - every[0][:, None, None] - normalised.mul_(every[1][:, None, None])
        to_x *= (weight * inverse)[:, None, None]
        return to_x.to(x.dtype), own[1], own[0], None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel over the batches of all ranks."""
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    own = torch.stack([mean, variance])
    parts = [torch.empty_like(own) for _ in range(_world())]
    distributed.all_gather(parts, own)
    means, variances = torch.stack(parts, dim=1)  # [W, C] each
    # The variances within the ranks and between them (Chan et al. 1983): a sum of squares loses digits to the mean.
    between, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + between


def _world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
