"""U-GAT-IT's generator: an encoder that attends, and a decoder whose norms are steered by what it attends to."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.attention import ClassActivation
from i2i_dist.networks.blocks import InstanceNorm, RepeatedBlocks
from i2i_dist.networks.resnet import check_size
from i2i_dist.ops import adalin, iln

Variance = Literal["unbiased", "biased"]


class Translation(NamedTuple):
    """What a generator makes of images [N, 3, H, W].

    Attributes:
        image: [N, 3, H, W] in [-1, 1].
        logits: [N, 2], large for an image of the domain that the generator translates from.
        attended: [N, C, H / 4, W / 4], at least 0; its sum over the channels is the heat map.
    """

    image: Tensor
    logits: Tensor
    attended: Tensor


class AttentiveGenerator(nn.Module):
    """Image to image of the same size: two halvings, residual blocks, attention, AdaLIN blocks, two doublings, tanh.

    278,959,808 parameters at the defaults, of which 268,435,456 read the attended map in the full form, pooled to a
    grid; 10,589,888 in the light form, which reads only the mean of each channel. All convolutions are reflect-padded.

    Args:
        width: Channels of the stem; the blocks have four times as many.
        blocks: Number of residual blocks, and of AdaLIN blocks.
        light: The light form.
        cam_grid: Side of the grid. With 64 and pictures of 256 x 256 nothing is pooled, which is the original network.
        bias: Convolutions and linear layers have a bias.
        affine: Instance norms have a learned scale and shift.
        cam_shared: See `ClassActivation`.
        variance: Of AdaLIN and ILN.
        rho_smoothing: AdaLIN starts from rho = 1 and uses rho - 0.1, instead of starting from 0.9.

    The defaults are the authors' PyTorch code; the last five arguments make their TensorFlow code, but for the order in
    which the map is flattened, which only renames inputs.

    Source: Kim et al. 2020, section 2.1.1 and appendix A.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        blocks: int = 4,
        light: bool = False,
        cam_grid: int = 64,
        bias: bool = False,
        affine: bool = False,
        cam_shared: bool = False,
        variance: Variance = "unbiased",
        rho_smoothing: bool = False,
    ) -> None:
        super().__init__()
        deep, unbiased = 4 * width, variance == "unbiased"
        self.stem = _Stage(3, width, 7, bias=bias, affine=affine)
        self.down1 = _Stage(width, 2 * width, 3, stride=2, bias=bias, affine=affine)
        self.down2 = _Stage(2 * width, deep, 3, stride=2, bias=bias, affine=affine)
        self.blocks = RepeatedBlocks(_ResidualBlock(deep, bias=bias, affine=affine) for _ in range(blocks))
        self.cam = ClassActivation(deep, shared=cam_shared)
        self.style = _Style(deep, grid=None if light else cam_grid, bias=bias)
        self.adaptive_blocks = RepeatedBlocks(
            _AdaptiveBlock(deep, bias=bias, unbiased=unbiased, rho_smoothing=rho_smoothing) for _ in range(blocks)
        )
        self.up1 = _Doubling(deep, 2 * width, bias=bias, unbiased=unbiased)
        self.up2 = _Doubling(2 * width, width, bias=bias, unbiased=unbiased)
        self.to_image = _conv(width, 3, 7, bias=bias)

    def forward(self, image: Tensor) -> Translation:
        """Translate `image` `[N, 3, H, W]` in [-1, 1]; ValueError unless H and W are multiples of 4, at least 8."""
        check_size(image)
        x = self.down2(self.down1(self.stem(image)))
        x = self.blocks(x)
        attended, logits = self.cam(x)
        gamma, beta = self.style(attended)
        x = self.adaptive_blocks(attended, gamma, beta)
        translated = self.to_image(self.up2(self.up1(x))).tanh()
        return Translation(translated, logits, attended)


def _conv(before: int, after: int, kernel: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=bias, padding_mode="reflect")


class _Stage(nn.Module):
    """Convolution, instance norm, ReLU."""

    def __init__(self, before: int, after: int, kernel: int, *, stride: int = 1, bias: bool, affine: bool) -> None:
        super().__init__()
        self.conv = _conv(before, after, kernel, stride=stride, bias=bias)
        self.norm = InstanceNorm(after, affine)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(self.conv(x), activation="relu")
        return normalised


class _ResidualBlock(nn.Module):
    """Two convolutions with instance norm; no activation after the sum."""

    def __init__(self, channels: int, *, bias: bool, affine: bool) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, bias=bias)
        self.norm1 = InstanceNorm(channels, affine)
        self.conv2 = _conv(channels, channels, 3, bias=bias)
        self.norm2 = InstanceNorm(channels, affine)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm1(self.conv1(x), activation="relu")
        summed: Tensor = self.norm2(self.conv2(branch), residual=x)
        return summed


class _AdaptiveBlock(nn.Module):
    """Two convolutions with AdaLIN, all of the same gamma and beta; no activation after the sum."""

    def __init__(self, channels: int, *, bias: bool, unbiased: bool, rho_smoothing: bool) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, bias=bias)
        self.norm1 = _AdaLIN(channels, unbiased, rho_smoothing)
        self.conv2 = _conv(channels, channels, 3, bias=bias)
        self.norm2 = _AdaLIN(channels, unbiased, rho_smoothing)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        branch = self.norm1(self.conv1(x), gamma, beta, activation="relu")
        summed: Tensor = self.norm2(self.conv2(branch), gamma, beta, residual=x)
        return summed


class _Doubling(nn.Module):
    """Nearest neighbours to twice height and width, convolution, ILN, ReLU."""

    def __init__(self, before: int, after: int, *, bias: bool, unbiased: bool) -> None:
        super().__init__()
        self.conv = _conv(before, after, 3, bias=bias)
        self.norm = _ILN(after, unbiased)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))
        return normalised


class _Style(nn.Module):
    """gamma and beta `[N, C]` of all AdaLIN layers, from the attended map `[N, C, h, w]`.

    A perceptron reads the map averaged to `grid` x `grid`, channel by channel and row by row, or the mean of each
    channel where `grid` is None.
    """

    def __init__(self, channels: int, *, grid: int | None, bias: bool) -> None:
        super().__init__()
        self.grid = grid or 1
        self.hidden1 = nn.Linear(channels * self.grid**2, channels, bias=bias)
        self.hidden2 = nn.Linear(channels, channels, bias=bias)
        self.to_gamma = nn.Linear(channels, channels, bias=bias)
        self.to_beta = nn.Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (self.grid, self.grid):
            x = F.adaptive_avg_pool2d(x, self.grid)
        hidden = F.relu(self.hidden2(F.relu(self.hidden1(x.flatten(1)))))
        return self.to_gamma(hidden), self.to_beta(hidden)


class _AdaLIN(nn.Module):
    """Adaptive layer-instance norm; `rho`, kept in [0, 1] by whoever steps it, is the share of instance statistics."""

    def __init__(self, channels: int, unbiased: bool, smoothing: bool) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.full((channels,), 1.0 if smoothing else 0.9))
        self.unbiased, self.smoothing = unbiased, smoothing

    def forward(
        self, x: Tensor, gamma: Tensor, beta: Tensor, *, activation: str = "none", residual: Tensor | None = None
    ) -> Tensor:
        rho = (self.rho - 0.1).clamp(0.0, 1.0) if self.smoothing else self.rho
        return adalin(x, gamma, beta, rho, unbiased=self.unbiased, activation=activation, residual=residual)


class _ILN(nn.Module):
    """Layer-instance norm and ReLU; starts as layer norm."""

    def __init__(self, channels: int, unbiased: bool) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(channels))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.unbiased = unbiased

    def forward(self, x: Tensor) -> Tensor:
        return iln(x, self.gamma, self.beta, self.rho, unbiased=self.unbiased, activation="relu")
