"""A small unpaired data set with a hidden ground truth, for demonstrations and to test that training learns."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from i2i_dist.draws import generator

_Pixels = npt.NDArray[np.uint8]

_OVERSAMPLING = 3  # pictures are drawn larger and reduced, which smooths the edges

# The two families of colours lie opposite each other, and the hidden map turns hues by about a third of that: which
# colour of A becomes which of B follows from the unpaired pictures. Sizes are radii as shares of the picture's side.
_BACKGROUND_HUE = 222.0
_SHAPE_HUE = 42.0
_RADII = {"circle": (0.11, 0.18), "square": (0.10, 0.16), "triangle": (0.10, 0.15)}


def hidden_map(image: _Pixels) -> _Pixels:
    """Return the true translation of a picture from A to B: blue becomes purple, orange becomes green.

    Args:
        image: uint8 `[..., 3]`, RGB.

    Returns:
        uint8 of the same shape: (R, G, B) becomes `20 + 0.85 * ((G + 2 B) / 3, R, B)`.
    """
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    mapped = np.stack([(green + 2 * blue) / 3, red, blue], axis=-1)
    return np.rint(20.0 + 0.85 * mapped).astype(np.uint8)


def write_dataset(root: Path, *, size: int = 64, train: int, test: int, seed: int) -> None:
    """Write `trainA trainB testA testB` as PNG files.

    Pictures of A are scenes of coloured shapes on a smooth background; pictures of B are `hidden_map` of other scenes,
    so no picture of B belongs to one of A.

    Args:
        root: Folder that receives the four folders.
        size: Side of the pictures in pixels.
        train: Pictures in each of trainA and trainB.
        test: Pictures in each of testA and testB.
        seed: Seed of the scenes.
    """
    for name, count in (("trainA", train), ("trainB", train), ("testA", test), ("testB", test)):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = scene(generator(seed, f"synthetic.{name}", number), size)
            if name.endswith("B"):
                picture = hidden_map(picture)
            Image.fromarray(picture).save(folder / f"{number:05d}.png")


def scene(rng: np.random.Generator, size: int) -> _Pixels:
    """Draw one picture of the kind A, uint8 `[size, size, 3]`."""
    side = size * _OVERSAMPLING
    image = Image.fromarray(_background(rng, side))
    draw = ImageDraw.Draw(image)
    for kind, (smallest, largest) in _RADII.items():
        for _ in range(int(rng.integers(1, 4))):
            radius = rng.uniform(smallest, largest) * side
            x, y = rng.uniform(0.1, 0.9, size=2) * side
            colour = tuple(int(c) for c in _colour(_SHAPE_HUE + rng.uniform(-12, 12), 0.8, rng.uniform(0.75, 1.0)))
            if kind == "circle":
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            else:
                corners = 4 if kind == "square" else 3
                draw.regular_polygon((x, y, radius * 1.3), corners, rotation=float(rng.uniform(0, 360)), fill=colour)
    return np.array(image.resize((size, size), Image.Resampling.BOX))


def _background(rng: np.random.Generator, side: int) -> _Pixels:
    """A gradient, uint8 `[side, side, 3]`; light always comes from below, so that light and dark can be told apart."""
    angle = np.pi / 2 + rng.uniform(-0.7, 0.7)
    y, x = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
    along = (x * np.cos(angle) + y * np.sin(angle)) / (abs(np.cos(angle)) + abs(np.sin(angle))) + 0.5  # [side, side]
    dark, light = rng.uniform(0.25, 0.4), rng.uniform(0.85, 1.0)
    full = _colour(_BACKGROUND_HUE + rng.uniform(-10, 10), 0.75, 1.0)
    picture: _Pixels = (full * (dark + (light - dark) * along)[..., None]).astype(np.uint8)
    return picture


def _colour(hue: float, saturation: float, value: float) -> npt.NDArray[np.float64]:
    return 255.0 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def score(translated: _Pixels, sources: _Pixels) -> dict[str, float]:
    """Compare translations from A to B with the hidden truth.

    Args:
        translated: uint8 `[N, H, W, 3]`, what a model made of the sources.
        sources: uint8 `[N, H, W, 3]`, pictures of A.

    Returns:
        Mean absolute errors on a scale from 0 to 1: `error` of the translations, `identity` of the untouched sources,
        `constant` of the best single picture (the median of the truth); and
        `recovered = 1 - error / min(identity, constant)`: 1 is perfect, 0 no better than a trivial answer.

    Raises:
        ValueError: The shapes differ.
    """
    if translated.shape != sources.shape:
        raise ValueError(f"translated has shape {translated.shape} and sources {sources.shape}; they must be equal.")
    truth = hidden_map(sources).astype(np.float64)

    def error_of(answer: npt.NDArray[np.generic]) -> float:
        return float(np.abs(answer.astype(np.float64) - truth).mean() / 255.0)

    error, identity, constant = error_of(translated), error_of(sources), error_of(np.median(truth, axis=0))
    recovered = 1.0 - error / min(identity, constant)
    return {"error": error, "identity": identity, "constant": constant, "recovered": recovered}
