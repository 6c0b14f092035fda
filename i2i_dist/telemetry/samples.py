"""Sheets of sample images: labelled rows or columns that a person compares at a glance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MAX_SIDE = 4096  # pixels; beyond it viewers and web pages struggle

_LEGIBLE_SIDE = 128  # pixels; smaller images are enlarged up to it
_SMALLEST_SIDE = 8
_GAP = 4
_FONT_SIZE = 18
_BACKGROUND = (40, 40, 40)
_INK = (235, 235, 235)


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """Return images as bytes, rounded to nearest; what lies outside the range is clamped, NaN becomes black.

    Args:
        images: Floating `[N, 3, H, W]` in [-1, 1], on any device.

    Returns:
        `[N, H, W, 3]`, contiguous, in [0, 255].

    Raises:
        ValueError: The shape or the dtype is another.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be floating [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    scaled = (images.detach().float().nan_to_num(nan=-1.0) + 1.0) * 127.5
    array: npt.NDArray[np.uint8] = (
        scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    )
    return array


class _Layout(NamedTuple):
    """Sizes of a sheet, in pixels."""

    cell: tuple[int, int]  # width, height of an image's place
    columns: int
    rows: int
    band: int  # width of the labels
    font_size: int
    top: int  # height of the heads
    head_size: int  # of their font
    scale: float  # of the images

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.cell
        return self.band + self.columns * (width + _GAP), self.top + _GAP + self.rows * (height + _GAP)

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Return the left upper corner of an image's place."""
        width, height = self.cell
        return self.band + column * (width + _GAP), self.top + _GAP + row * (height + _GAP)


def write_grid(path: Path, rows: Sequence[tuple[str, Tensor]], heads: Sequence[str] = ()) -> None:
    """Write a PNG with one row for each label, the label at the left; the file appears whole or not at all.

    Images smaller than 128 pixels are enlarged by a whole factor, and all are shrunk where the sheet's longer side
    would exceed 4096 pixels. Rows may differ in the number and size of their images: columns stay aligned.

    Args:
        path: The file to write; its folder is made.
        rows: Labels ("real A", or two lines with a newline) with images, floating `[N, 3, H, W]` in [-1, 1].
        heads: What stands above the columns, broken into lines after each "+"; letters are as small as a column needs.

    Raises:
        ValueError: There is no image, a tensor is of another shape, or there are too many images for one sheet.
        OSError: The file cannot be written.
    """
    arrays = [(label, to_uint8(images)) for label, images in rows]
    if not any(array.size for _, array in arrays):
        raise ValueError("a sheet of samples needs at least one image")
    lines = [head.replace("+", "+\n") for head in heads]
    layout = _layout(arrays, lines)
    font, head_font = (ImageFont.load_default(size=size) for size in (layout.font_size, layout.head_size))
    sheet = Image.new("RGB", layout.size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    width, height = layout.cell
    for column, head in enumerate(lines):
        left, top = layout.place(0, column)
        middle, foot = left + width / 2, top - _padding(layout.head_size)
        draw.text((middle, foot), head, font=head_font, fill=_INK, anchor="md", align="center")
    for row, (label, array) in enumerate(arrays):
        top = layout.place(row, 0)[1]
        draw.text((_padding(layout.font_size), top + height / 2), label, font=font, fill=_INK, anchor="lm")
        for column, pixels in enumerate(array):
            image = _scaled(pixels, layout.scale)
            left, top = layout.place(row, column)
            sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    _save(sheet, path)


def _padding(font_size: int) -> int:
    return font_size * 2 // 3


def _padded(extent: int, font_size: int) -> int:
    return extent + 2 * _padding(font_size) if extent else 0


def _extent(texts: Sequence[str], font_size: int) -> tuple[int, int]:
    """Return the width of the widest text and the height of the highest; 0 where there is none."""
    font, draw = ImageFont.load_default(size=font_size), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.textbbox((0, 0), text, font=font) for text in texts]
    width = max((right - left for left, _, right, _ in boxes), default=0)
    return round(width), round(max((bottom - top for _, top, _, bottom in boxes), default=0))


def _layout(arrays: Sequence[tuple[str, npt.NDArray[np.uint8]]], heads: Sequence[str]) -> _Layout:
    rows = len(arrays)
    columns = max(array.shape[0] for _, array in arrays)
    height = max(array.shape[1] for _, array in arrays)
    width = max(array.shape[2] for _, array in arrays)
    # Labels grow with the sheet, which is looked at as a whole; many rows leave each less room.
    side = min(MAX_SIDE, max(columns * width, rows * height))
    font_size = max(_FONT_SIZE, min(side // 64, MAX_SIDE // (4 * rows)))
    label_width, label_height = _extent([label for label, _ in arrays], font_size)
    head_width, head_height = _extent(heads, font_size)
    band = _padded(label_width, font_size) or _GAP

    room_x = (MAX_SIDE - band) / columns - _GAP
    room_y = (MAX_SIDE - _padded(head_height, font_size) - _GAP) / rows - _GAP
    scale = min(room_x / width, room_y / height)
    if scale >= 1:
        scale = max(1, min(int(scale), _LEGIBLE_SIDE // max(width, height)))
    # A row is never lower than its label, or neighbouring labels would run into each other.
    cell = (int(width * scale), max(label_height, int(height * scale)))
    # Columns are as wide as their images: what stands above them has to fit, with room to its neighbours.
    head_room = cell[0] * 9 // 10
    head_size = font_size if head_width <= head_room else max(1, font_size * head_room // head_width)
    top = _padded(_extent(heads, head_size)[1], head_size)
    layout = _Layout(cell, columns, rows, band, font_size, top, head_size, scale)
    if scale * max(width, height) < _SMALLEST_SIDE or max(layout.size) > MAX_SIDE:
        raise ValueError(f"{rows} rows of {columns} images do not fit on a sheet of {MAX_SIDE} pixels; give fewer")
    return layout


def _scaled(pixels: npt.NDArray[np.uint8], scale: float) -> Image.Image:
    image = Image.fromarray(pixels)
    if scale == 1:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    # Enlarged pixels stay squares: smoothing would hide the artefacts that one looks for.
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        sheet.save(temporary, format="PNG", compress_level=3)  # level 6 takes twice as long for a few per cent
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
