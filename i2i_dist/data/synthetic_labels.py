"""A small data set with labels, and an oracle that reads them off any picture, to measure what a method has learned."""

from __future__ import annotations

import colorsys
import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from i2i_dist.data.labels import LabelSpace
from i2i_dist.draws import generator

COLOURS = ("red", "green", "blue")
ATTRIBUTES = (*COLOURS, "big", "round")  # what is not big is small, and what is not round is square
LABELS_NAME = "labels.csv"

_Pixels = npt.NDArray[np.uint8]
_Labels = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float64]

_OVERSAMPLING = 4  # pictures are drawn larger and reduced, which smooths the edges
_AREAS = {0: (0.04, 0.07), 1: (0.15, 0.22)}  # of the object, as shares of the picture, by `big`
_BIG_FROM = (_AREAS[0][1] * _AREAS[1][0]) ** 0.5
_FAINTEST = 24.0  # difference of colourfulness, of 255, below which a picture shows no object
_BIG, _ROUND = ATTRIBUTES.index("big"), ATTRIBUTES.index("round")


def label_space() -> LabelSpace:
    """Return the space of the labels: 12 classes."""
    return LabelSpace(ATTRIBUTES, exactly_one=[COLOURS])


def write_labelled_dataset(root: Path, *, size: int = 32, train: int, test: int, seed: int) -> None:
    """Write `trainA testA` as PNG files, and `labels.csv` for `launchers/pack.py --labels-csv`.

    Each picture shows one object on a smooth greyish background. Its class is drawn from all 12 alike; its place, its
    size and hue within those of its class, and the background are drawn, too.

    Args:
        root: Folder that receives the folders and the file; pictures are named in it by their path below `root`.
        size: Side of the pictures in pixels.
        train: Pictures in trainA.
        test: Pictures in testA.
        seed: Seed of the pictures.
    """
    classes = label_space().classes
    root.mkdir(parents=True, exist_ok=True)
    with (root / LABELS_NAME).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["picture", *ATTRIBUTES])
        for name, count in (("trainA", train), ("testA", test)):
            (root / name).mkdir(exist_ok=True)
            for number in range(count):
                rng = generator(seed, f"synthetic_labels.{name}", number)
                label = classes[rng.integers(len(classes))]
                path = f"{name}/{number:05d}.png"
                Image.fromarray(draw(rng, label, size)).save(root / path)
                table.writerow([path, *label.tolist()])


def draw(rng: np.random.Generator, label: npt.NDArray[np.integer], size: int) -> _Pixels:
    """Draw a picture, uint8 `[size, size, 3]`, of a label `[5]`."""
    side = size * _OVERSAMPLING
    area = rng.uniform(*_AREAS[int(label[_BIG])])
    reach = (area / np.pi) ** 0.5 if label[_ROUND] else area**0.5 / 2  # from the middle to the edge
    x, y = rng.uniform(reach + 1 / size, 1 - reach - 1 / size, size=2)
    down, right = np.abs((np.mgrid[0:side, 0:side] + 0.5) / side - np.array([y, x])[:, None, None])
    inside = np.hypot(down, right) <= reach if label[_ROUND] else np.maximum(down, right) <= reach
    hue = 120.0 * int(np.argmax(label[: len(COLOURS)])) + rng.uniform(-20, 20)
    colour = _colour(hue, rng.uniform(0.75, 0.95), rng.uniform(0.75, 1.0))
    picture = np.where(inside[..., None], colour, _background(rng, side))
    return np.array(Image.fromarray(picture.astype(np.uint8)).resize((size, size), Image.Resampling.BOX))


def _background(rng: np.random.Generator, side: int) -> _Floats:
    """A gradient between two greyish colours, `[side, side, 3]`."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    angle = rng.uniform(0, 2 * np.pi)
    along = 0.5 + ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)) / (abs(np.cos(angle)) + abs(np.sin(angle)))
    one, other = (_colour(rng.uniform(0, 360), 0.06, rng.uniform(0.3, 0.8)) for _ in range(2))
    gradient: _Floats = one + (other - one) * along[..., None]
    return gradient


def _colour(hue: float, saturation: float, value: float) -> _Floats:
    return 255.0 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def read_labels(pictures: _Pixels) -> _Labels:
    """Read the labels off pictures.

    The object is what is more colourful than the rest. Its colour is the greatest channel of its mean, its size follows
    from its area, and its shape is that of the disc and the square of this area and place that it is more alike.

    Args:
        pictures: uint8 `[N, H, W, 3]`, of any content.

    Returns:
        uint8 `[N, 5]` of 0 and 1. All are 0, no colour among them, where no object stands out.

    Raises:
        ValueError: `pictures` has another shape or type.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"pictures are {pictures.dtype} {list(pictures.shape)}; allowed are uint8 [N, H, W, 3].")
    labels: _Labels = np.zeros((len(pictures), len(ATTRIBUTES)), dtype=np.uint8)
    for label, picture in zip(labels, pictures.astype(np.float64), strict=True):
        mask = _object(picture)
        if mask is None:
            continue
        label[int(np.argmax((picture * mask[..., None]).sum(axis=(0, 1))))] = 1
        label[_BIG] = mask.mean() > _BIG_FROM
        label[_ROUND] = _is_round(mask)
    return labels


def _object(picture: _Floats) -> _Floats | None:
    """Return how much of each pixel is the object's, `[H, W]`, from 0 to 1; None where there is none."""
    colourful = picture.max(axis=-1) - picture.min(axis=-1)
    rest = float(np.median(colourful))  # objects cover less than half of a picture
    brightest = np.sort(colourful.ravel())[-max(1, colourful.size // 50) :]  # and more than a fiftieth
    contrast = float(brightest.mean()) - rest
    if contrast < _FAINTEST:
        return None
    # The edge stays where it is, halfway, while noise on either side of it is cut off.
    mask: _Floats = np.clip(2.0 * (colourful - rest) / contrast - 0.5, 0.0, 1.0)
    return mask


def _is_round(mask: _Floats) -> bool:
    height, width = mask.shape
    area = mask.sum()
    y, x = np.mgrid[0:height, 0:width]
    down, right = (np.abs(axis - (axis * mask).sum() / area) for axis in (y, x))
    radius, half = (area / np.pi) ** 0.5, area**0.5 / 2
    disc = np.clip(radius + 0.5 - np.hypot(down, right), 0.0, 1.0)
    square = np.clip(half + 0.5 - down, 0.0, 1.0) * np.clip(half + 0.5 - right, 0.0, 1.0)
    return bool(np.abs(mask - disc).sum() < np.abs(mask - square).sum())


def edit_accuracy(pictures: _Pixels, targets: npt.NDArray[np.integer]) -> dict[str, float]:
    """Say how many pictures are as they were asked to be.

    Args:
        pictures: uint8 `[N, H, W, 3]`, what a method made.
        targets: `[N, 5]` of 0 and 1, what was asked for.

    Returns:
        Shares from 0 to 1: of pictures with the right `colour`, `size` and `shape`, and of those that are right as a
        `whole`. A picture that shows no object is wrong in everything.

    Raises:
        ValueError: The shapes do not fit together.
    """
    if targets.shape != (len(pictures), len(ATTRIBUTES)) or not len(pictures):
        raise ValueError(
            f"targets have the shape {list(targets.shape)}; allowed is one row of {len(ATTRIBUTES)} for each of the "
            f"{len(pictures)} pictures, of which there is at least one."
        )
    found = read_labels(pictures)
    right = (found == targets) & found[:, : len(COLOURS)].any(axis=1, keepdims=True)
    groups = {"colour": right[:, : len(COLOURS)].all(axis=1), "size": right[:, _BIG], "shape": right[:, _ROUND]}
    return {name: float(hits.mean()) for name, hits in (groups | {"whole": right.all(axis=1)}).items()}
