"""Sheets of translated pictures: one row for each picture, one column for each label that it is translated into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from i2i_dist.data.transforms import resize
from i2i_dist.telemetry.samples import write_grid

ROWS = 16  # pictures of a sheet
_SIDE = 256  # pixels; what is larger is shown smaller

_Pixels = npt.NDArray[np.uint8]


def reduced(pixels: _Pixels) -> _Pixels:
    """Return uint8 [H, W, 3] as large as a sheet shows it at most: no side is longer than 256 pixels."""
    return _scaled(pixels, min(_SIDE, max(pixels.shape)))


class Sheets:
    """Collects pictures with their translations and writes `labels-001.png`, `labels-002.png` and so on.

    No translation has such a name: those have an underscore before the label.

    Attributes:
        problem: Why a sheet could not be written, if so.
    """

    def __init__(self, target: Path, heads: Sequence[str]) -> None:
        """Begin the first sheet.

        Args:
            target: The folder for them.
            heads: What stands above the columns of translations.
        """
        self._target, self._heads = target, ("source", *heads)
        self._rows: list[Sequence[_Pixels]] = []
        self._count = 0
        self.problem: str | None = None

    def add(self, row: Sequence[_Pixels]) -> None:
        """Add a picture and its translations, uint8 [H, W, 3], `reduced`."""
        self._rows.append(row)
        if len(self._rows) == ROWS:
            self.finish()

    def finish(self) -> None:
        """Write what there is of a sheet, if anything."""
        if not self._rows:
            return
        # Small pictures among larger ones are enlarged, or nothing could be seen on them.
        side = max(max(row[0].shape) for row in self._rows)
        images = [np.stack([_scaled(pixels, side) for pixels in row]) for row in self._rows]
        self._rows = []
        self._count += 1
        path = self._target / f"labels-{self._count:03d}.png"
        try:
            shown = [("", torch.from_numpy(row).permute(0, 3, 1, 2) / 127.5 - 1.0) for row in images]
            write_grid(path, shown, self._heads)
        except OSError as error:
            self.problem = f"{path} cannot be written: {error}"


def _scaled(pixels: _Pixels, side: int) -> _Pixels:
    """Resize to a longer side of `side` pixels."""
    height, width, _ = pixels.shape
    longer = max(height, width)
    if longer == side:
        return pixels
    return resize(pixels, max(1, round(width * side / longer)), max(1, round(height * side / longer)))
