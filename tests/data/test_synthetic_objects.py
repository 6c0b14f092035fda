"""Objects that must not move: the domains differ as stated, and the score knows true, moved, lost and added ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.synthetic_objects import (
    DOMAINS,
    Domain,
    Scene,
    Thing,
    found,
    mask,
    object_score,
    render,
    scenes,
    write_objects,
)

SIZE = 32


def rendered(shown: list[Scene], domain: Domain, size: int = SIZE) -> np.ndarray:
    return np.stack([render(scene, domain, size) for scene in shown])


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["testA", "testB"])
def test_true_translations_are_perfect_and_sources_are_not(name: str, size: int) -> None:
    shown = scenes(3, name, 40)
    for target, other in (DOMAINS, DOMAINS[::-1]):
        truth = rendered(shown, target, size)
        assert object_score(truth, shown, target) == {"iou": 1.0, "error": 0.0}
        untouched = object_score(rendered(shown, other, size), shown, target)
        assert untouched["iou"] == 0.0 and untouched["error"] > 0.4
        noisy = np.clip(truth.astype(int) + np.random.default_rng(0).integers(-50, 51, truth.shape), 0, 255)
        assert object_score(noisy.astype(np.uint8), shown, target)["iou"] == 1.0


def test_masks_are_where_objects_are_drawn() -> None:
    things = (Thing(True, 0.25, 0.5, 0.125, 0.0), Thing(False, 0.75, 0.25, 0.1, 1.0))
    scene = Scene(things, 0.0, 1.0)
    covered, by_day = mask(scene, 64), render(scene, "a", 64)
    assert covered[32, 16] and covered[16, 48] and not covered[32, 40] and not covered[48, 48]
    assert covered.sum() == pytest.approx(np.pi * 8**2 + (2 * 0.85 * 6.4) ** 2, rel=0.06)
    assert (by_day[32, 16] == (20, 60, 40)).all() and (by_day[16, 48] == (75, 150, 95)).all()
    assert (by_day[0, 63] == (190, 200, 215)).all() and (by_day[63, 63] == (240, 245, 250)).all()
    assert (render(scene, "b", 64)[32, 16] == (200, 90, 30)).all()


def test_what_moved_was_lost_or_was_added_costs() -> None:
    first, second = Thing(True, 0.25, 0.5, 0.125, 0.5), Thing(True, 0.75, 0.5, 0.125, 0.5)
    one, both, moved = (Scene(things, 0.5, 0.5) for things in ((first,), (first, second), (first._replace(x=0.375),)))
    pictures = {name: rendered([scene], "b", 64) for name, scene in (("one", one), ("both", both), ("moved", moved))}
    assert object_score(pictures["both"], [one], "b")["iou"] == pytest.approx(0.5)
    assert object_score(pictures["one"], [both], "b")["iou"] == pytest.approx(0.5)
    half = 2 * np.arccos(0.5) - np.sin(2 * np.arccos(0.5))  # of two discs, each with its edge on the other's middle
    assert object_score(pictures["moved"], [one], "b")["iou"] == pytest.approx(half / (2 * np.pi - half), abs=0.03)
    empty = np.zeros_like(pictures["one"])
    assert object_score(empty, [one], "b")["iou"] == 0.0
    other_colour = pictures["one"].copy()
    other_colour[found(other_colour, "b")] = (250, 200, 80)
    score = object_score(other_colour, [one], "b")
    assert score["iou"] == 1.0 and 0 < score["error"] < 0.02


def test_domains_differ_in_numbers_sizes_and_places() -> None:
    a, b = scenes(0, "trainA", 200), scenes(0, "trainB", 200)
    assert {len(scene.things) for scene in a} == {1, 2} and {len(scene.things) for scene in b} == {4, 5, 6}
    x, radii = ([[getattr(t, key) for s in one for t in s.things] for one in (a, b)] for key in ("x", "radius"))
    assert np.mean(x[0]) < 0.4 < 0.6 < np.mean(x[1])
    assert min(radii[0]) > max(radii[1])
    left = [mask(scene, SIZE)[:, : SIZE // 2].mean() / mask(scene, SIZE).mean() for scene in (a[0], b[0])]
    assert left[0] > left[1]
    levels = np.array([[scene.top, scene.bottom] for scene in a + b])
    assert np.allclose(levels[:200].mean(0), levels[200:].mean(0), atol=0.1)  # of backgrounds there are the same


def test_files_show_the_scenes_and_none_twice(tmp_path: Path) -> None:
    write_objects(tmp_path, size=SIZE, train=5, test=3, seed=7)
    seen = set()
    for name, count in (("trainA", 5), ("trainB", 5), ("testA", 3), ("testB", 3)):
        source = open_source(tmp_path, name)
        pictures = np.stack([decode_image(source.read(number)[1]) for number in range(sum(source.counts))])
        domain: Domain = "a" if name.endswith("A") else "b"
        assert np.array_equal(pictures, rendered(scenes(7, name, count), domain))
        seen |= {scene.things for scene in scenes(7, name, count)}
    assert len(seen) == 16
    assert scenes(7, "testA", 3) == scenes(7, "testA", 5)[:3] != scenes(8, "testA", 3)


def test_shapes_must_agree() -> None:
    shown = scenes(0, "testA", 2)
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32, 3\) for 2 scenes"):
        object_score(rendered(shown, "b")[:1], shown, "b")
