"""The ResNet generator of CycleGAN, CUT and DCLGAN, with feature maps tapped by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.blocks import BlurDownsample, RepeatedBlocks, ResidualBlock, upsample
from i2i_dist.ops import instance_norm_act

_OUTER_TAPS = ("rgb", "down1", "down2")


def check_tap(name: str, blocks: int) -> None:
    """Refuse the name of a feature map that a generator with `blocks` residual blocks does not have.

    Raises:
        ValueError: There is none of this name; the message says which there are.
    """
    # Nine digits, since int() refuses thousands of them in words of its own.
    block = re.fullmatch(r"block([1-9][0-9]{0,8})", name)
    if name in _OUTER_TAPS or (block and int(block[1]) <= blocks):
        return
    # A configuration may ask for billions of blocks; the first hundred are enough to find what was meant.
    known = [*_OUTER_TAPS, *(f"block{number}" for number in range(1, min(blocks, 100) + 1))]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ValueError(
        f"no feature map is called '{name}'; allowed is {', '.join(_OUTER_TAPS)}, block1 to block{blocks}{hint}"
    )


def check_taps(names: Sequence[str], blocks: int) -> None:
    """Refuse names of feature maps that a generator with `blocks` residual blocks does not have, and repeated ones.

    Raises:
        ValueError: One of the names cannot be used; the message says which, and why.
    """
    for name in names:
        check_tap(name, blocks)
        if names.count(name) > 1:
            raise ValueError(f"'{name}' stands there more than once; name each layer once")


class ResNetGenerator(nn.Module):
    """Image to image of the same size: 7x7 stem, two halvings, residual blocks, two doublings, 7x7 conv, tanh.

    With `antialias` the halvings are conv then blur, and the doublings bilinear then conv (CUT, DCLGAN); without, they
    are strided and transposed convolutions (CycleGAN). Both have 11,378,179 parameters at the defaults.

    Args:
        in_channels: Channels of the input image.
        out_channels: Channels of the output image.
        width: Channels of the stem; the blocks have four times as many.
        blocks: Number of residual blocks.
        antialias: Whether resampling uses the fixed filters.

    Tap names are `"rgb"` (the reflect-padded image), `"down1"` and `"down2"` (raw outputs of the two halving stages'
    convolutions) and `"block1"` to `"block<blocks>"`; these are layers 0, 4, 8, 12, 13, ... of the anti-aliased
    official code. Convolutions in front of an instance norm have a bias, as there.

    Source: Zhu et al. 2017 (appendix 7.2); Park et al. 2020 for the anti-aliased form and its taps.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        blocks: int = 9,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        stride = 1 if antialias else 2
        self.stem = nn.Conv2d(in_channels, width, 7)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 3, stride=stride, padding=1)
        self.blur1: nn.Module = BlurDownsample(2 * width) if antialias else nn.Identity()
        self.blur2: nn.Module = BlurDownsample(4 * width) if antialias else nn.Identity()
        self.blocks = RepeatedBlocks(ResidualBlock(4 * width) for _ in range(blocks))
        self.up1 = _Doubling(4 * width, 2 * width, antialias)
        self.up2 = _Doubling(2 * width, width, antialias)
        self.to_image = nn.Conv2d(width, out_channels, 7)
        self._outer_channels = dict(zip(_OUTER_TAPS, (in_channels, 2 * width, 4 * width), strict=True))
        self._block_channels = 4 * width

    def tap_channels(self, taps: Sequence[str]) -> tuple[int, ...]:
        """Return the channel counts of the feature maps named by `taps`; ValueError for a name that is not there."""
        for tap in taps:
            check_tap(tap, len(self.blocks))
        return tuple(self._outer_channels.get(tap, self._block_channels) for tap in taps)

    def forward(
        self, image: Tensor, taps: Sequence[str] = (), encode_only: bool = False
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Translate `image`, and hand out the feature maps named by `taps`.

        Args:
            image: `[N, in_channels, H, W]` in [-1, 1]; H and W multiples of 4, at least 8.
            taps: Names of feature maps, in any order.
            encode_only: Stop right after the last feature map asked for.

        Returns:
            The translated image `[N, out_channels, H, W]` in [-1, 1], or None if `encode_only`; and the feature maps
            `[N, C, h, w]` in the order of `taps`.

        Raises:
            ValueError: For a size that does not fit, or an unknown tap.
        """
        check_size(image)
        self.tap_channels(taps)
        missing = set(taps)
        features: dict[str, Tensor] = {}
        x = image
        for name, x in self._encode(image):
            if name in missing:
                features[name] = x
                missing.remove(name)
            if encode_only and not missing:
                break
        tapped = tuple(features[tap] for tap in taps)
        return (None if encode_only else self._decode(x)), tapped

    def _encode(self, image: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each tap's name and value; nothing after a value is computed until the next is asked for."""
        x = F.pad(image, (3, 3, 3, 3), mode="reflect")
        yield "rgb", x
        x = self.down1(instance_norm_act(self.stem(x), activation="relu"))
        yield "down1", x
        x = self.down2(self.blur1(instance_norm_act(x, activation="relu")))
        yield "down2", x
        x = self.blur2(instance_norm_act(x, activation="relu"))
        for number, made in enumerate(self.blocks.outputs(x), start=1):
            yield f"block{number}", made

    def _decode(self, x: Tensor) -> Tensor:
        x = instance_norm_act(self.up1(x), activation="relu")
        x = instance_norm_act(self.up2(x), activation="relu")
        image: Tensor = self.to_image(F.pad(x, (3, 3, 3, 3), mode="reflect"))
        return image.tanh()


class _Doubling(nn.Module):
    """Double height and width and change the channels: bilinear then 3x3 conv, or one transposed convolution."""

    def __init__(self, in_channels: int, out_channels: int, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias
        self.conv: nn.Module = (
            nn.Conv2d(in_channels, out_channels, 3, padding=1)
            if antialias
            else nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(upsample(x) if self.antialias else x)
        return doubled


def check_size(image: Tensor) -> None:
    """Refuse an image that a generator with two halvings cannot take; ValueError says what would fit."""
    height, width = image.shape[-2:]
    if height % 4 or width % 4 or min(height, width) < 8:
        fit = " x ".join(str(max(8, -(-side // 4) * 4)) for side in (height, width))
        raise ValueError(
            f"the generator was given images of {height} x {width}; height and width must be multiples of 4, "
            f"at least 8. Pad them to {fit}, or crop or resize them to a size that fits."
        )
