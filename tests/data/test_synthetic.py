"""The synthetic data set is deterministic, unpaired, and far from every trivial answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.synthetic import hidden_map, score, write_dataset


def load(root: Path, name: str) -> np.ndarray:
    source = open_source(root, name)
    return np.stack([decode_image(source.read(i)[1]) for i in range(sum(source.counts))])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    write_dataset(root, size=32, train=20, test=16, seed=4)
    return root


def test_hidden_map_is_the_stated_function() -> None:
    picture = np.array([[[0, 100, 255], [40, 40, 40]]], dtype=np.uint8)
    assert hidden_map(picture).tolist() == [[[193, 20, 237], [54, 54, 54]]]


def test_perfect_and_trivial_answers(root: Path) -> None:
    sources = load(root, "testA")
    truth = hidden_map(sources)
    assert score(truth, sources)["recovered"] == 1.0
    assert score(truth, sources)["error"] == 0.0
    untouched = score(sources, sources)
    assert untouched["error"] == untouched["identity"] and untouched["recovered"] <= 0
    constant = np.broadcast_to(np.median(truth, axis=0), truth.shape).astype(np.uint8)
    assert abs(score(constant, sources)["recovered"]) < 0.01
    off = np.clip(truth.astype(int) + np.where(truth > 127, -51, 51), 0, 255).astype(np.uint8)
    assert score(off, sources)["error"] == pytest.approx(0.2)


def test_trivial_answers_are_far_off(root: Path) -> None:
    sources = load(root, "testA")
    result = score(sources, sources)
    assert result["identity"] > 0.15 and result["constant"] > 0.1


def test_b_looks_like_the_map_of_a_but_is_not_paired(root: Path) -> None:
    a, b = load(root, "trainA"), load(root, "trainB")
    assert a.shape == b.shape == (20, 32, 32, 3)
    mapped = hidden_map(a)
    np.testing.assert_allclose(mapped.mean((0, 1, 2)), b.mean((0, 1, 2)), atol=15)
    gaps = np.abs(mapped[:, None].astype(int) - b[None]).mean((2, 3, 4))  # [A, B]
    assert gaps.min() > 10
    test_pictures = {picture.tobytes() for picture in load(root, "testA")}
    assert not test_pictures & {picture.tobytes() for picture in a}


def test_same_seed_same_files(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, size=32, train=2, test=1, seed=4)
    assert (load(tmp_path, "trainB") == load(root, "trainB")[:2]).all()
    write_dataset(tmp_path, size=32, train=2, test=1, seed=5)
    assert (load(tmp_path, "trainB") != load(root, "trainB")[:2]).any()


def test_shapes_must_agree(root: Path) -> None:
    sources = load(root, "testA")
    with pytest.raises(ValueError, match="they must be equal"):
        score(sources[:3], sources)
