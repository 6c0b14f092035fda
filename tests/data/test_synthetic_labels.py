"""The labelled synthetic set is what its labels say, and its oracle reads them off any picture."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from i2i_dist.data.synthetic_labels import (
    ATTRIBUTES,
    draw,
    edit_accuracy,
    label_space,
    read_labels,
    write_labelled_dataset,
)

CLASSES = label_space().classes


def pictures(size: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of all classes, and their labels."""
    rng, labels = np.random.default_rng(seed), CLASSES[np.arange(count) % len(CLASSES)]
    return np.stack([draw(rng, label, size) for label in labels]), labels


def blurred(stack: np.ndarray, radius: float) -> np.ndarray:
    return np.stack([np.array(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in stack])


def test_there_are_twelve_classes() -> None:
    assert ATTRIBUTES == ("red", "green", "blue", "big", "round")
    assert sorted(map(tuple, CLASSES.tolist())) == sorted(
        (*colour, big, circle) for colour in np.eye(3, dtype=int).tolist() for big in (0, 1) for circle in (0, 1)
    )


@pytest.mark.parametrize("size", [32, 64])
def test_clean_pictures_are_read_without_a_mistake(size: int) -> None:
    stack, labels = pictures(size, 240)
    found = read_labels(stack)
    assert found.dtype == np.uint8 and found.tolist() == labels.tolist()
    assert edit_accuracy(stack, labels) == {"colour": 1.0, "size": 1.0, "shape": 1.0, "whole": 1.0}


def test_pictures_are_what_their_labels_say() -> None:
    # Reckoned apart from the oracle: pixels of which one channel is far above the two others.
    stack, labels = pictures(64, 120)
    ordered = np.sort(stack.astype(int), axis=-1)
    inside = ordered[..., 2] - ordered[..., 1] > 50  # [N, H, W]
    for picture, mask, label in zip(stack, inside, labels, strict=True):
        assert (picture[mask].argmax(axis=-1) == label[:3].argmax()).all()
        share = mask.mean()
        assert 0.14 < share < 0.23 if label[3] else 0.03 < share < 0.075
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert abs(len(rows) - len(columns)) <= 2
        filled = mask.sum() / (len(rows) * len(columns))
        assert filled < 0.87 if label[4] else filled > 0.93
        assert rows[0] > 0 and columns[0] > 0 and rows[-1] < 63 and columns[-1] < 63
    outside = ~(stack.max(axis=-1) - stack.min(axis=-1) > 40)
    assert (outside | inside).mean() > 0.99  # what is not the object is greyish


def test_everything_else_varies() -> None:
    rng = np.random.default_rng(0)
    same = np.stack([draw(rng, np.array([0, 1, 0, 1, 1]), 32) for _ in range(40)]).astype(int)
    assert (read_labels(same.astype(np.uint8)) == [0, 1, 0, 1, 1]).all()
    masks = same[..., 1] - same[..., [0, 2]].max(axis=-1) > 50
    middles = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
    assert (np.ptp(middles, axis=0) > 10).all()
    assert np.ptp(masks.sum(axis=(1, 2))) > 40
    hues = np.array([(one[mask][:, 0] - one[mask][:, 2]).mean() for one, mask in zip(same, masks, strict=True)])
    assert hues.min() < -30 and hues.max() > 30  # towards blue, and towards yellow
    assert np.ptp(same[:, 0, 0].mean(axis=-1)) > 60


def test_pictures_that_are_not_clean_are_read_as_well_as_can_be() -> None:
    stack, labels = pictures(32, 240)
    rng = np.random.default_rng(0)
    noisy = np.clip(stack + rng.normal(0, 10, stack.shape), 0, 255).astype(np.uint8)
    assert edit_accuracy(noisy, labels)["whole"] > 0.98
    assert edit_accuracy(blurred(stack, 1.0), labels)["whole"] > 0.98
    pale = (0.4 * stack + 0.6 * 128).astype(np.uint8)
    assert edit_accuracy(pale, labels)["whole"] > 0.98
    washed_out = edit_accuracy(blurred(stack, 2.0), labels)
    assert washed_out["colour"] == washed_out["size"] == 1.0 and washed_out["shape"] < 0.8
    mirrored = edit_accuracy(stack[:, ::-1, ::-1], labels)
    assert mirrored["whole"] == 1.0


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_no_picture_is_too_strange(size: int) -> None:
    rng = np.random.default_rng(0)
    strange = np.stack([
        np.zeros((size, size, 3)), np.full((size, size, 3), 255), np.full((size, size, 3), (255, 0, 0)),
        rng.integers(0, 256, (size, size, 3)), np.eye(size)[..., None] * (0, 0, 255),
    ]).astype(np.uint8)  # fmt: skip
    found = read_labels(strange)
    assert found.shape == (5, 5) and found.max() <= 1 and (found[:, :3].sum(axis=1) <= 1).all()
    assert not found[:3].any()  # nothing stands out of a picture of one colour
    assert read_labels(strange[:0]).shape == (0, 5)


def test_a_picture_without_an_object_is_wrong_in_everything() -> None:
    grey = np.full((2, 32, 32, 3), 120, dtype=np.uint8)
    small_squares = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    assert edit_accuracy(grey, small_squares) == {"colour": 0.0, "size": 0.0, "shape": 0.0, "whole": 0.0}


def test_accuracies_are_of_groups_and_of_whole_labels() -> None:
    stack, labels = pictures(32, 4)
    targets = labels.copy()
    targets[0, 3] ^= 1  # another size
    targets[1, 3:] ^= 1  # another size and shape
    targets[2, :3] = np.roll(targets[2, :3], 1)  # another colour
    assert edit_accuracy(stack, targets) == {"colour": 0.75, "size": 0.5, "shape": 0.75, "whole": 0.25}


@pytest.mark.parametrize(("shape", "kind"), [((2, 8, 8), "uint8"), ((2, 3, 8, 8), "uint8"), ((2, 8, 8, 3), "float32")])
def test_what_is_no_stack_of_pictures_is_refused(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are uint8 \[N, H, W, 3\]"):
        read_labels(np.zeros(shape, dtype=kind))


def test_targets_are_one_for_each_picture() -> None:
    stack, labels = pictures(32, 4)
    for targets, some in ((labels[:3], stack), (labels[:, :4], stack), (labels[:0], stack[:0])):
        with pytest.raises(ValueError, match="one row of 5 for each of the"):
            edit_accuracy(some, targets)


def test_the_files_hold_pictures_and_their_labels(tmp_path: Path) -> None:
    write_labelled_dataset(tmp_path / "new" / "set", size=32, train=60, test=20, seed=4)
    root = tmp_path / "new" / "set"
    assert sorted(path.name for path in root.iterdir()) == ["labels.csv", "testA", "trainA"]
    with (root / "labels.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["picture", *ATTRIBUTES] and len(rows) == 80
    stack = np.stack([np.array(Image.open(root / row[0])) for row in rows])
    assert stack.shape == (80, 32, 32, 3)
    assert read_labels(stack).tolist() == [[int(value) for value in row[1:]] for row in rows]
    assert {row[0] for row in rows} == {path.relative_to(root).as_posix() for path in root.glob("*/*.png")}
    assert len({tuple(row[1:]) for row in rows}) == 12
    assert len({picture.tobytes() for picture in stack}) == 80


def test_same_seed_same_files(tmp_path: Path) -> None:
    for name, seed, train in (("one", 4, 3), ("same", 4, 2), ("other", 5, 2)):
        write_labelled_dataset(tmp_path / name, train=train, test=1, seed=seed)
    one, same, other = (
        [(tmp_path / name / path).read_bytes() for path in ("trainA/00001.png", "testA/00000.png")]
        for name in ("one", "same", "other")
    )
    assert one == same and one[0] != other[0] and one[1] != other[1]
