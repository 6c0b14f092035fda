"""Codes: drawn by number, turned from one into another, and how far apart what they make is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from i2i_dist import styles


def test_a_code_depends_on_the_seed_and_its_number_alone() -> None:
    codes = styles.drawn(7, 5, 8)
    assert (codes.shape, codes.dtype) == ((5, 8), torch.float32)
    assert torch.equal(styles.drawn(7, 2, 8), codes[:2])
    assert not torch.isclose(styles.drawn(8, 5, 8), codes).any()
    assert len(codes.unique(dim=0)) == 5
    many = styles.drawn(0, 2000, 8)
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03


def test_codes_on_the_way_turn_evenly_and_keep_their_length() -> None:
    first, last = 3.0 * torch.eye(4)[0], 3.0 * torch.eye(4)[1]
    way = styles.between(first, last, 4)
    angles = torch.rad2deg(torch.atan2(way[:, 1], way[:, 0]))
    assert torch.allclose(angles, torch.tensor([0.0, 30.0, 60.0, 90.0]), atol=1e-4)
    assert torch.allclose(way.norm(dim=1), torch.full((4,), 3.0))
    longer = styles.between(first, 2 * last, 3)
    assert torch.allclose(longer.norm(dim=1), torch.tensor([3.0, 4.5, 6.0]))


@pytest.mark.parametrize(("factor", "middle"), [(-1.0, 0.0), (1.0, 1.0), (0.0, 0.5), (2.0, 1.5)])
def test_where_no_way_round_is_nearer_it_is_straight(factor: float, middle: float) -> None:
    code = torch.tensor([1.0, -2.0, 0.5])
    way = styles.between(code, factor * code, 3)
    assert torch.allclose(way, torch.stack([code, middle * code, factor * code]), atol=1e-6)


def test_both_ends_are_codes_of_the_way() -> None:
    first, last = styles.drawn(0, 2, 8)
    for steps in (2, 9):
        way = styles.between(first, last, steps)
        assert way.shape == (steps, 8)
        assert torch.allclose(way[[0, -1]], torch.stack([first, last]), atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_diversity_is_the_mean_difference_over_all_pairs(count: int) -> None:
    pictures = list(np.random.default_rng(count).integers(256, size=(count, 5, 7, 3), dtype=np.uint8))
    pairs = itertools.combinations([picture.astype(float) for picture in pictures], 2)
    assert styles.diversity(pictures) == pytest.approx(np.mean([np.abs(one - other).mean() for one, other in pairs]))
    assert styles.diversity([pictures[0]] * count) == 0
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert styles.diversity([black, white]) == 255
