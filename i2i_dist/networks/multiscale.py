"""PatchGAN discriminators at several scales of one image, and several such discriminators in one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.patchgan import PatchGAN


class MultiscalePatchGAN(nn.Module):
    """PatchGANs with strided convolutions and instance norm: scale s judges the image halved s times by averages.

    Scale s has half the channels of scale s - 1. At the defaults there are 3,458,978 parameters.

    Args:
        in_channels: Channels of the image (6 for a pair of RGB images).
        width: Channels of the first stage of scale 0, at least `2**(scales - 1)`.
        layers: Number of halvings within each scale.
        scales: Number of scales.

    Source: Zhu et al. 2017 ("Toward multimodal image-to-image translation"), section 4; the layers are those of the
    authors' PyTorch code.
    """

    def __init__(self, *, in_channels: int = 3, width: int = 64, layers: int = 3, scales: int = 2) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchGAN(in_channels=in_channels, width=width >> scale, layers=layers, antialias=False)
            for scale in range(scales)
        )
        self.layers = layers
        # Halving rounds up, so the last scale sees enough from one pixel more than so many halves of one too few.
        self.smallest = (3 * 2**layers - 1) * 2 ** (scales - 1) + 1

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Judge `image`.

        Args:
            image: `[N, in_channels, H, W]` in [-1, 1]; H and W large enough for the last scale.

        Returns:
            Logits `[N, 1, h, w]` of each scale, 30 x 30 and 14 x 14 for 256 x 256; large means real.

        Raises:
            ValueError: For an image that is too small.
        """
        height, width = image.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"the discriminator was given images of {height} x {width}; with {len(self.scales)} scales of "
                f"{self.layers} layers they must be at least {self.smallest} x {self.smallest}. Use larger images, or "
                f"fewer layers or scales."
            )
        logits: list[Tensor] = []
        for critic in self.scales:
            if logits:
                image = F.avg_pool2d(image, 3, stride=2, padding=1, count_include_pad=False)
            logits.append(critic(image))
        return tuple(logits)


class CriticsByKind(nn.Module):
    """Discriminators of the same structure, `critic_KIND` for each kind of image.

    Args:
        kinds: The kinds.
        size: What `MultiscalePatchGAN` takes.
    """

    def __init__(self, kinds: Sequence[str], **size: Any) -> None:
        super().__init__()
        for kind in kinds:
            self.add_module(f"critic_{kind}", MultiscalePatchGAN(**size))

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """Judge, by kind, images `[N, in_channels, H, W]`; of each come its logits at each scale."""
        return {kind: self.get_submodule(f"critic_{kind}")(image) for kind, image in images.items()}
