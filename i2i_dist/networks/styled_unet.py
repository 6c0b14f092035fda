"""The U-Net generator of BicycleGAN, which reads a code beside the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.unet import check_size
from i2i_dist.ops import instance_norm_act


class StyledUNetGenerator(nn.Module):
    """Image and code to image of the same size: a U-Net whose halving convolutions all read the code besides.

    4x4 convolutions that halve, as many that double, and a skip at every size. Instance norm, without weight and bias,
    follows every convolution but the first, the innermost that halves, and the one that makes the image; all have a
    bias. Dropout follows the norms of the doubling stages that have `8 * width` channels on both sides, but for the
    innermost: three with 8 halvings, two with 7. At the defaults there are 54,794,627 parameters, with 7 halvings
    42,145,155.

    Args:
        style_dim: Numbers of a code.
        in_channels: Channels of the input image.
        out_channels: Channels of the output image.
        width: Channels of the first stage; they double up to eightfold.
        downs: Number of halvings, at least 2.
        dropout: Share of the values that dropout sets to 0.

    Source: Zhu et al. 2017 ("Toward multimodal image-to-image translation"), section 4 and figure 3(b); the layers are
    those of the authors' PyTorch code.
    """

    def __init__(
        self,
        *,
        style_dim: int = 8,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        downs: int = 8,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if downs < 2:
            raise ValueError(f"the U-Net was given {downs} halvings; it needs at least 2, an outer and an inner one.")
        self.style_dim, self.dropout = style_dim, dropout
        self.multiple = 2**downs
        self._widths = widths = [width * min(2**level, 8) for level in range(downs)]
        self.downs = nn.ModuleList(
            nn.Conv2d(before + style_dim, after, 4, stride=2, padding=1)
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        # From the innermost outwards; all others read a skip behind what comes from below.
        inputs = [widths[-1], *(2 * below for below in widths[-2:0:-1])]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
            for before, after in zip(inputs, widths[-2::-1], strict=True)
        )
        self.to_image = nn.ConvTranspose2d(2 * width, out_channels, 4, stride=2, padding=1)
        self._dropped = range(1, downs - 4) if dropout else range(0)  # stages of `ups`

    def dropout_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Return (C, h, w) of every value that dropout works on, for images of `height` x `width`, in order."""
        halvings = [len(self.ups) - stage for stage in self._dropped]
        return [(self._widths[n - 1], height >> n, width >> n) for n in halvings]

    def forward(self, image: Tensor, codes: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
        """Translate `image`.

        Args:
            image: `[N, in_channels, H, W]` in [-1, 1]; H and W multiples of `2**downs`.
            codes: `[N, style_dim]`, one for each image.
            keep: For each of `dropout_shapes(H, W)` which values dropout keeps, bool `[N, C, h, w]`; None drops none.

        Returns:
            `[N, out_channels, H, W]` in [-1, 1].

        Raises:
            ValueError: For a size that does not fit, or codes that are not one for each image.
        """
        check_size(image, len(self.downs))
        if codes.shape != (len(image), self.style_dim):
            raise ValueError(
                f"the U-Net was given codes of shape {list(codes.shape)} for {len(image)} images; it needs one of "
                f"{self.style_dim} numbers for each image: [{len(image)}, {self.style_dim}]."
            )
        x, skips = F.leaky_relu(self.downs[0](_beside(image, codes)), 0.2), []
        styles = F.leaky_relu(codes, 0.2)  # from here on the rectifier takes the code with the map it lies beside
        for level, down in enumerate(list(self.downs)[1:], start=1):
            # The authors hand on what has not gone through the leaky rectifier. It comes to the same: a plain rectifier
            # follows, which removes whatever the leaky one changes.
            skips.append(x)
            x = down(_beside(x, styles))
            if level < len(self.ups):
                x = instance_norm_act(x, activation="leaky_relu")
        x = F.relu(x)
        masks = {} if keep is None else dict(zip(self._dropped, keep, strict=True))
        for stage, up in enumerate(self.ups):
            x = instance_norm_act(up(x), activation="relu")
            if stage in masks:
                x = x * masks[stage] / (1 - self.dropout)
            x = torch.cat([x, F.relu(skips.pop())], dim=1)
        translated: Tensor = self.to_image(x).tanh()
        return translated


def _beside(x: Tensor, codes: Tensor) -> Tensor:
    """Return maps `[N, C + style_dim, H, W]`: those of `x` `[N, C, H, W]`, and each number of its code as a map."""
    return torch.cat([x, codes.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])], dim=1)
