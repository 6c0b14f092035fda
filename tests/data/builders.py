"""Small pictures and data sets that the data tests read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from i2i_dist.data.folders import open_source
from i2i_dist.data.reader import Reader
from i2i_dist.data.transforms import Transform

PLAIN = Transform(load_size=8, crop_size=8, flip=False, full_size_from=None)


def noise(seed: int, height: int = 8, width: int = 8) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: npt.NDArray[np.generic] | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_folder(folder: Path, count: int, seed: int = 0) -> None:
    """Each picture is of one colour, which names it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, seed, 0)).save(folder / f"{number:03d}.png")


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def reader_of(root: Path, seed: int = 5, transform: Transform = PLAIN) -> Reader:
    sources = {domain: open_source(root, f"train{domain.upper()}") for domain in "ab"}
    return Reader(sources, seed=seed, transform=transform)
