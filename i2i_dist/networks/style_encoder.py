"""The encoder of BicycleGAN: from an image to the distribution of its code."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.projection import ExactLinear
from i2i_dist.ops import instance_norm_act


class Gaussian(NamedTuple):
    """A normal distribution for each image, its numbers independent of each other: [N, style_dim] each.

    Attributes:
        mean: The means.
        logvar: Logarithms of the variances; None where only the mean is learned.
    """

    mean: Tensor
    logvar: Tensor | None


class StyleEncoder(nn.Module):
    """A 4x4 convolution and residual blocks, each of which halves; the mean over all pixels; a linear layer.

    At the defaults there are 2,590,032 parameters, with 3 blocks 1,344,080. The authors' code has 4 blocks for pictures
    of 256 x 256 and 3 for 128 x 128, where its pooling covers just what is left; the mean is that for any size.

    Args:
        style_dim: Numbers of a code.
        in_channels: Channels of the image.
        width: Channels of the first stage; block n has `width * min(4, n + 1)`.
        blocks: Number of residual blocks, at least 1.
        variance: Whether there is a second linear layer, for the logarithm of the variance.

    Source: Zhu et al. 2017 ("Toward multimodal image-to-image translation"), section 4; the layers are those of the
    authors' PyTorch code.
    """

    def __init__(
        self, *, style_dim: int = 8, in_channels: int = 3, width: int = 64, blocks: int = 4, variance: bool = True
    ) -> None:
        super().__init__()
        widths = [width * min(4, stage + 1) for stage in range(blocks + 1)]
        self.smallest = 2 ** (blocks + 1)
        self.stem = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(HalvingBlock(before, after) for before, after in itertools.pairwise(widths))
        self.to_mean = ExactLinear(widths[-1], style_dim)
        self.to_logvar = ExactLinear(widths[-1], style_dim) if variance else None

    def forward(self, image: Tensor) -> Gaussian:
        """Encode `image`.

        Args:
            image: `[N, in_channels, H, W]` in [-1, 1]; H and W at least `2**(blocks + 1)`.

        Returns:
            The distribution of each image's code, at least fp32.

        Raises:
            ValueError: For an image that is too small.
        """
        height, width = image.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"the encoder was given images of {height} x {width}; with {len(self.blocks)} blocks they must be at "
                f"least {self.smallest} x {self.smallest}. Use larger images or fewer blocks."
            )
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(x, 0.2).mean((2, 3))
        return Gaussian(self.to_mean(x), None if self.to_logvar is None else self.to_logvar(x))


class HalvingBlock(nn.Module):
    """Twice a norm, a leaky ReLU and a 3x3 convolution, then the mean of 2x2 pixels; a 1x1 convolution goes past it.

    Source: He et al. 2016 ("Identity mappings in deep residual networks"), as the authors of BicycleGAN use it.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, before, 3, padding=1)
        self.conv2 = nn.Conv2d(before, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[N, before, H, W]`, H, W > 1, to `[N, after, H // 2, W // 2]`."""
        branch = self.conv1(instance_norm_act(x, activation="leaky_relu"))
        branch = self.conv2(instance_norm_act(branch, activation="leaky_relu"))
        halved: Tensor = F.avg_pool2d(branch, 2) + self.shortcut(F.avg_pool2d(x, 2))
        return halved
