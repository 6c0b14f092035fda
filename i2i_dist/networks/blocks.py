"""Parts shared by the networks: fixed resampling filters, instance norm, the residual block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.ops import iln, instance_norm_act


class BlurDownsample(nn.Module):
    """Halve an image after a fixed binomial blur: reflect pad 1, depthwise outer([1, 2, 1] / 4), stride 2.

    `[N, C, H, W]` with H, W > 1 becomes `[N, C, ceil(H / 2), ceil(W / 2)]`. The filter is made in code and not saved.

    Source: Zhang 2019, "Making convolutional networks shift-invariant again", filter Triangle-3.
    """

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(taps, taps).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blur and halve `x` `[N, C, H, W]`."""
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel, stride=2, groups=self.kernel.size(0))


def upsample(x: Tensor) -> Tensor:
    """Double `x` `[N, C, H, W]` bilinearly with half-pixel centres and clamped edges, to `[N, C, 2H, 2W]`.

    It equals zero insertion followed by outer([1, 3, 3, 1]) / 16, the filter that anti-aliased generators use.
    """
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class InstanceNorm(nn.Module):
    """Instance norm with the biased variance, and a learned scale and shift where `affine`."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels)) if affine else None
        self.beta = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor, *, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """Norm `x` `[N, C, H, W]`; `ops.instance_norm_act` says what the arguments mean."""
        if self.gamma is None or self.beta is None:
            return instance_norm_act(x, activation=activation, residual=residual)
        # ILN of instance statistics alone is this norm, with activation and residual in one op.
        rho = torch.ones_like(self.gamma)
        return iln(x, self.gamma, self.beta, rho, unbiased=False, activation=activation, residual=residual)


class ResidualBlock(nn.Module):
    """Two reflect-padded 3x3 convolutions with instance norm; no activation after the sum.

    Source: Johnson et al. 2016, as CycleGAN and CUT use it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[N, C, H, W]`, H, W > 1, to the same shape."""
        branch = self.conv1(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        branch = instance_norm_act(branch, activation="relu")
        branch = self.conv2(F.pad(branch, (1, 1, 1, 1), mode="reflect"))
        return instance_norm_act(branch, residual=x)
