"""The U-Net generator of pix2pix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.batch_norm import BatchNorm, Statistics


class UNetGenerator(nn.Module):
    """Image to image of the same size: 4x4 convolutions that halve, as many that double, and a skip at every size.

    Batch norm follows every convolution but the first, the innermost that halves, and the one that makes the image,
    which alone has a bias. Dropout follows the norms of the doubling stages that have `8 * width` channels on both
    sides, but for the innermost: three with 8 halvings, two with 7. At the defaults there are 54,413,955 parameters
    (U-Net-256), with 7 halvings 41,828,995 (U-Net-128).

    Args:
        in_channels: Channels of the input image.
        out_channels: Channels of the output image.
        width: Channels of the first stage; they double up to eightfold.
        downs: Number of halvings, at least 2.
        dropout: Share of the values that dropout sets to 0.

    Source: Isola et al. 2017, section 3.2.1 and appendix 6.1.1; the layers are those of the authors' PyTorch code.
    """

    def __init__(
        self, *, in_channels: int = 3, out_channels: int = 3, width: int = 64, downs: int = 8, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if downs < 2:
            raise ValueError(f"the U-Net was given {downs} halvings; it needs at least 2, an outer and an inner one.")
        self.dropout = dropout
        self.multiple = 2**downs
        self._widths = widths = [width * min(2**level, 8) for level in range(downs)]
        self.downs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False)
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.down_norms = nn.ModuleList(BatchNorm(after) for after in widths[1:-1])
        # From the innermost outwards; all others read a skip beside what comes from below.
        inputs = [widths[-1], *(2 * below for below in widths[-2:0:-1])]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
            for before, after in zip(inputs, widths[-2::-1], strict=True)
        )
        self.up_norms = nn.ModuleList(BatchNorm(after) for after in widths[-2::-1])
        self.to_image = nn.ConvTranspose2d(2 * width, out_channels, 4, stride=2, padding=1)
        self._dropped = range(1, downs - 4) if dropout else range(0)  # stages of `ups`

    def dropout_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Return (C, h, w) of every value that dropout works on, for images of `height` x `width`, in order."""
        halvings = [len(self.ups) - stage for stage in self._dropped]
        return [(self._widths[n - 1], height >> n, width >> n) for n in halvings]

    def forward(self, image: Tensor, keep: Sequence[Tensor], statistics: Statistics = "batch") -> Tensor:
        """Translate `image`.

        Args:
            image: `[N, in_channels, H, W]` in [-1, 1]; H and W multiples of `2**downs`.
            keep: For each of `dropout_shapes(H, W)` which values dropout keeps, bool `[N, C, h, w]` or `[1, C, h, w]`.
            statistics: What the batch norms normalise by.

        Returns:
            `[N, out_channels, H, W]` in [-1, 1].

        Raises:
            ValueError: For a size that does not fit.
        """
        check_size(image, len(self.downs))
        x, skips = self.downs[0](image), []
        for level, down in enumerate(list(self.downs)[1:]):
            # The authors' rectifier works in place, so what skips the inner stages has gone through it.
            x = F.leaky_relu(x, 0.2)
            skips.append(x)
            x = down(x)
            if level < len(self.down_norms):
                x = self.down_norms[level](x, statistics)
        x = F.relu(x)
        masks = dict(zip(self._dropped, keep, strict=True))
        for stage, (up, norm) in enumerate(zip(self.ups, self.up_norms, strict=True)):
            x = norm(up(x), statistics)
            if stage in masks:
                x = x * masks[stage] / (1 - self.dropout)
            x = F.relu(torch.cat([skips.pop(), x], dim=1))
        translated: Tensor = self.to_image(x).tanh()
        return translated


def check_size(image: Tensor, downs: int) -> None:
    """Refuse images [N, C, H, W] that cannot be halved `downs` times.

    Raises:
        ValueError: With the size that fits.
    """
    (height, width), multiple = image.shape[-2:], 2**downs
    if height % multiple or width % multiple or not height * width:
        fit = " x ".join(str(max(1, -(-side // multiple)) * multiple) for side in (height, width))
        raise ValueError(
            f"the U-Net was given images of {height} x {width}; with {downs} halvings height and width "
            f"must be multiples of {multiple}. Pad them to {fit}, crop or resize them, or use fewer halvings."
        )
