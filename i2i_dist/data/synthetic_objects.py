"""A small unpaired data set whose objects must not move, and a score that says whether they did.

By day (A) there are few and large objects at the left, by night (B) many and small ones at the right: a generator that
only has to please the critic of the other domain does well to add, remove and move some. Which domain a pixel and what
it shows belong to is seen in its colour alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from i2i_dist.draws import generator

Domain = Literal["a", "b"]
DOMAINS: tuple[Domain, Domain] = ("a", "b")

_Pixels = npt.NDArray[np.uint8]
_Mask = npt.NDArray[np.bool_]
_Floats = npt.NDArray[np.float64]
_Ends = tuple[tuple[int, int, int], tuple[int, int, int]]  # of a range of colours, RGB


class _Habits(NamedTuple):
    """How many objects a scene of a domain has, how large they are and where their middles lie, in shares of a side."""

    counts: tuple[int, int]
    radii: tuple[float, float]
    columns: tuple[float, float]


_HABITS: dict[Domain, _Habits] = {
    "a": _Habits((1, 2), (0.11, 0.15), (0.15, 0.50)),
    "b": _Habits((4, 6), (0.07, 0.10), (0.40, 0.90)),
}
# From the dullest to the brightest. Red tells objects from backgrounds: less than half of it by day means an object,
# more than half by night, with at least 50 of 255 to spare on either side.
_BACKGROUNDS: dict[Domain, _Ends] = {"a": ((190, 200, 215), (240, 245, 250)), "b": ((15, 15, 45), (55, 50, 95))}
_OBJECTS: dict[Domain, _Ends] = {"a": ((20, 60, 40), (75, 150, 95)), "b": ((200, 90, 30), (250, 200, 80))}
_HALF = 127.5


class Thing(NamedTuple):
    """An object: a disc or a square, its middle and half its breadth in shares of a side, and its brightness."""

    is_disc: bool
    x: float
    y: float
    radius: float
    brightness: float  # in [0, 1]


class Scene(NamedTuple):
    """What a picture shows, by day or by night.

    Attributes:
        things: The objects, the last in front.
        top: Brightness of the background at the upper edge, in [0, 1].
        bottom: At the lower edge.
    """

    things: tuple[Thing, ...]
    top: float
    bottom: float


def scenes(seed: int, name: str, count: int) -> list[Scene]:
    """Return the scenes of the pictures that `write_objects` writes to the folder `name`, trainA for example."""
    domain = _domain_of(name)
    return [_scene(generator(seed, f"synthetic_objects.{name}", number), domain) for number in range(count)]


def _domain_of(name: str) -> Domain:
    return "a" if name.endswith("A") else "b"


def _scene(rng: np.random.Generator, domain: Domain) -> Scene:
    habits = _HABITS[domain]
    things = tuple(
        Thing(
            is_disc=bool(rng.integers(2)),
            x=rng.uniform(*habits.columns),
            y=rng.uniform(0.15, 0.85),
            radius=rng.uniform(*habits.radii),
            brightness=rng.uniform(),
        )
        for _ in range(rng.integers(habits.counts[0], habits.counts[1] + 1))
    )
    return Scene(things, rng.uniform(), rng.uniform())


def render(scene: Scene, domain: Domain, size: int) -> _Pixels:
    """Draw a scene by day or by night, uint8 `[size, size, 3]`; the true translation is the same in the other domain.

    Edges are hard, so that every pixel is of an object or of the background.
    """
    shade = np.linspace(scene.top, scene.bottom, size)[:, None, None]
    picture = np.broadcast_to(_mixed(_BACKGROUNDS[domain], shade), (size, size, 3)).copy()
    for thing in scene.things:
        picture[_inside(thing, size)] = _mixed(_OBJECTS[domain], np.array(thing.brightness))
    pixels: _Pixels = np.rint(picture).astype(np.uint8)
    return pixels


def mask(scene: Scene, size: int) -> _Mask:
    """Return where a scene's objects are, bool `[size, size]`."""
    covered: _Mask = np.any([_inside(thing, size) for thing in scene.things], axis=0)
    return covered


def _inside(thing: Thing, size: int) -> _Mask:
    middles = (np.arange(size) + 0.5) / size
    down, right = np.abs(middles - thing.y)[:, None], np.abs(middles - thing.x)
    inside: _Mask = (
        np.hypot(down, right) <= thing.radius if thing.is_disc else np.maximum(down, right) <= 0.85 * thing.radius
    )
    return inside


def _mixed(ends: _Ends, share: _Floats) -> _Floats:
    dull, bright = (np.array(end, dtype=np.float64) for end in ends)
    mixed: _Floats = dull + (bright - dull) * share
    return mixed


def found(pictures: _Pixels, domain: Domain) -> _Mask:
    """Read off pictures, uint8 `[..., 3]`, where objects are if they are of `domain`; bool `[...]`."""
    seen: _Mask = pictures[..., 0] < _HALF if domain == "a" else pictures[..., 0] > _HALF
    return seen


def write_objects(root: Path, *, size: int = 64, train: int, test: int, seed: int) -> None:
    """Write `trainA trainB testA testB` as PNG files.

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
        for number, scene in enumerate(scenes(seed, name, count)):
            Image.fromarray(render(scene, _domain_of(name), size)).save(folder / f"{number:05d}.png")


def object_score(translated: _Pixels, shown: list[Scene], domain: Domain) -> dict[str, float]:
    """Say how far objects stayed where they were, and were recoloured.

    Args:
        translated: uint8 `[N, S, S, 3]`, what a model made of pictures of the scenes.
        shown: The scenes.
        domain: What the pictures were translated to.

    Returns:
        `iou`: of the objects' places before and those read off the translations, intersection over union; a mean over
        pictures, 1 if nothing moved, appeared or went. `error`: mean absolute difference to the true translations, on a
        scale from 0 to 1.

    Raises:
        ValueError: There are not as many pictures as scenes, or they are no squares.
    """
    if len(translated) != len(shown) or translated.shape[1] != translated.shape[2]:
        raise ValueError(
            f"translated has shape {translated.shape} for {len(shown)} scenes; it must be [{len(shown)}, S, S, 3]."
        )
    size = translated.shape[1]
    places, read = np.stack([mask(scene, size) for scene in shown]), found(translated, domain)
    both, either = (places & read).sum((1, 2)), (places | read).sum((1, 2))
    truth = np.stack([render(scene, domain, size) for scene in shown]).astype(np.float64)
    error = np.abs(translated.astype(np.float64) - truth).mean() / 255.0
    return {"iou": float((both / either).mean()), "error": float(error)}
