"""The PatchGAN discriminator: one logit for each overlapping patch of an image."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.batch_norm import BatchNorm
from i2i_dist.networks.blocks import BlurDownsample
from i2i_dist.ops import instance_norm_act


class PatchGAN(nn.Module):
    """4x4 convolutions with zero padding 1, leaky ReLU 0.2 and a norm (none after the first and the last).

    `layers` halving stages are followed by one at stride 1 and by the conv to logits. With `antialias` a stage is a
    conv at stride 1 and a fixed blur (receptive field 84 x 84 for 3 layers); without, the conv has stride 2 (70 x 70).
    Either has 2,764,737 parameters at the defaults; with 6 channels and batch norm, as in pix2pix, 2,768,705.

    Args:
        in_channels: Channels of the image (6 for a pair of RGB images).
        width: Channels of the first stage; they double up to eightfold.
        layers: Number of halvings.
        antialias: Whether halving uses the fixed blur.
        norm: `"instance"`, without weight and bias; or `"batch"`, over the global batch, which takes the bias of the
            convolutions in front of it.

    Source: Isola et al. 2017 (appendix 6.1.2); Park et al. 2020 for the anti-aliased form.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        width: int = 64,
        layers: int = 3,
        antialias: bool = True,
        norm: Literal["instance", "batch"] = "instance",
    ) -> None:
        super().__init__()
        widths = [width * min(2**stage, 8) for stage in range(layers + 1)]
        inputs = [in_channels, *widths[:-1]]
        strides = [1 if antialias else 2] * layers + [1]
        biases = [True] + [norm == "instance"] * layers
        self.smallest = 3 * 2**layers
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=bias)
            for before, after, stride, bias in zip(inputs, widths, strides, biases, strict=True)
        )
        self.norms = nn.ModuleList(BatchNorm(w) for w in widths[1:]) if norm == "batch" else None
        self.blurs = nn.ModuleList(BlurDownsample(w) if antialias else nn.Identity() for w in widths[:-1])
        self.to_logits = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Judge `image`.

        Args:
            image: `[N, in_channels, H, W]` in [-1, 1]; H and W at least 3 * 2**layers.

        Returns:
            Logits `[N, 1, h, w]`, 30 x 30 for 256 x 256; large means real.

        Raises:
            ValueError: For an image that is too small.
        """
        height, width = image.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"the discriminator was given images of {height} x {width}; with {len(self.blurs)} layers they must be "
                f"at least {self.smallest} x {self.smallest}. Use larger images or fewer layers."
            )
        x = F.leaky_relu(self.stages[0](image), 0.2, inplace=True)
        for number, (blur, stage) in enumerate(zip(self.blurs, list(self.stages)[1:], strict=True)):
            x = stage(blur(x))
            if self.norms is None:
                x = instance_norm_act(x, activation="leaky_relu")
            else:
                x = F.leaky_relu(self.norms[number](x), 0.2, inplace=True)
        logits: Tensor = self.to_logits(x)
        return logits
