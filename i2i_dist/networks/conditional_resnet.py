"""StarGAN's generator: a ResNet that is told by a label what its picture shall show."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from i2i_dist.networks.blocks import InstanceNorm, RepeatedBlocks
from i2i_dist.networks.resnet import check_size


class ConditionalGenerator(nn.Module):
    """Image and label to image of the same size: two halvings, residual blocks, two doublings, tanh.

    8,430,528 parameters at the defaults. The label's numbers are constant maps beside the image's channels. All
    convolutions are padded with zeros: an instance norm takes away what a constant map adds, and only at an edge of
    zeros can the label be seen at all.

    Args:
        attributes: L, numbers of a label.
        width: Channels of the stem; the blocks have four times as many.
        blocks: Number of residual blocks.

    Source: Choi et al. 2018, appendix on the architecture. The norms have no running statistics: the authors' code has
    them, and never uses them.
    """

    def __init__(self, *, attributes: int = 5, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        deep = 4 * width
        self.stem = nn.Conv2d(3 + attributes, width, 7, padding=3, bias=False)
        self.stem_norm = InstanceNorm(width, affine=True)
        self.down1, self.down1_norm = _halving(width, 2 * width), InstanceNorm(2 * width, affine=True)
        self.down2, self.down2_norm = _halving(2 * width, deep), InstanceNorm(deep, affine=True)
        self.blocks = RepeatedBlocks(_ResidualBlock(deep) for _ in range(blocks))
        self.up1, self.up1_norm = _doubling(deep, 2 * width), InstanceNorm(2 * width, affine=True)
        self.up2, self.up2_norm = _doubling(2 * width, width), InstanceNorm(width, affine=True)
        self.to_image = nn.Conv2d(width, 3, 7, padding=3, bias=False)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        """Translate.

        Args:
            image: `[N, 3, H, W]` in [-1, 1]; H and W multiples of 4, at least 8.
            labels: `[N, L]` of 0 and 1, what each picture shall show.

        Returns:
            `[N, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: For a size that does not fit.
        """
        check_size(image)
        maps = labels.to(image.dtype)[:, :, None, None].expand(-1, -1, *image.shape[-2:])
        x = self.stem_norm(self.stem(torch.cat([image, maps], 1)), activation="relu")
        x = self.down1_norm(self.down1(x), activation="relu")
        x = self.down2_norm(self.down2(x), activation="relu")
        x = self.blocks(x)
        x = self.up1_norm(self.up1(x), activation="relu")
        x = self.up2_norm(self.up2(x), activation="relu")
        translated: Tensor = self.to_image(x).tanh()
        return translated


def _halving(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False)


def _doubling(before: int, after: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)


class _ResidualBlock(nn.Module):
    """Two convolutions with instance norm; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = InstanceNorm(channels, affine=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = InstanceNorm(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm1(self.conv1(x), activation="relu")
        summed: Tensor = self.norm2(self.conv2(branch), residual=x)
        return summed
