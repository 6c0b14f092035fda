"""Resize, random crop and flip, as the official code does them, with draws keyed by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from i2i_dist.draws import generator


def resize(image: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Resize uint8 `[H, W, 3]` to `[height, width, 3]`, bicubic with antialiasing."""
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Transform:
    """From a decoded image to a training picture.

    Attributes:
        load_size: The image is resized to `load_size x load_size`, whatever its aspect ratio.
        crop_size: Side of the random crop that follows; at most `load_size`.
        flip: Whether half of the pictures are mirrored.
        full_size_from: From this position on the image is resized to `crop_size` and not cropped, as the official code
            does in the decay phase; None for never.
    """

    load_size: int
    crop_size: int
    flip: bool
    full_size_from: int | None

    def __post_init__(self) -> None:
        if not 0 < self.crop_size <= self.load_size:
            raise ValueError(
                f"crop_size is {self.crop_size} and load_size {self.load_size}; a crop must have at least one pixel "
                "and fit into the resized image: lower crop_size or raise load_size."
            )

    def __call__(self, image: npt.NDArray[np.uint8], *, seed: int, draw: str, position: int) -> npt.NDArray[np.uint8]:
        """Turn uint8 `[H, W, 3]` into uint8 `[crop_size, crop_size, 3]`.

        Pictures of the same `draw` and `position` are cropped and mirrored alike.
        """
        full_size = self.full_size_from is not None and position >= self.full_size_from
        load = self.crop_size if full_size else self.load_size
        picture = resize(image, load, load)
        top, left = generator(seed, f"crop.{draw}", position).integers(load - self.crop_size + 1, size=2)
        picture = picture[top : top + self.crop_size, left : left + self.crop_size]
        if self.flip and generator(seed, f"flip.{draw}", position).random() < 0.5:
            picture = picture[:, ::-1]
        return picture
