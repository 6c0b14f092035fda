"""Parts shared by the networks: fixed resampling filters, instance norm, the residual block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


class RepeatedBlocks(nn.ModuleList):
    """Blocks of which each reads what the one before made, and whose activations need not be kept.

    Where `recomputed`, a backward pass is left only what each block was given, and runs the block again: a third more
    arithmetic in the blocks, and the same numbers. So a block must do the same at a second call, with no draws of its
    own, no buffers that move, no word with other ranks, and the same of its parameters frozen. ResNet generators have
    such blocks. Other networks have not: a batch norm would count each batch twice, a power iteration would go one step
    too far, and an encoder that is frozen for one of its passes would be run again when it no longer is. Of a U-Net
    nearly all is kept for its skips, and critics are small.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """

    recomputed = False

    def forward(self, x: Tensor, *constant: Tensor) -> Tensor:
        """Return what the last of `outputs` is."""
        for made in self.outputs(x, *constant):
            x = made
        return x

    def outputs(self, x: Tensor, *constant: Tensor) -> Iterator[Tensor]:
        """Yield what each block makes in turn, of what the one before made and of `constant`; the first one reads `x`.

        Nothing after a value is computed until the next is asked for.
        """
        for block in self:
            if self.recomputed:
                # ZeRO 3 frees a layer's parameters in a hook at its forward's end, which an early stop would skip.
                x = checkpoint(block, x, *constant, use_reentrant=False, preserve_rng_state=False, early_stop=False)
            else:
                x = block(x, *constant)
            yield x
