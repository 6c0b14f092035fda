"""Random decisions are functions of seed, purpose and position, and of nothing else."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from i2i_dist.draws import Draws, generator


@pytest.mark.parametrize(("locations", "count"), [(4096, 256), (100, 256), (256, 256), (1, 1), (16_384, 1)])
def test_patch_ids_are_distinct_and_in_range(locations: int, count: int) -> None:
    for position in range(20):
        ids = Draws(3, position).patch_ids("ab.down1", locations, count)
        assert ids.dtype == torch.int64
        assert ids.shape == (min(count, locations),)
        assert len(ids.unique()) == len(ids)
        assert 0 <= int(ids.min()) <= int(ids.max()) < locations


def test_every_location_is_drawn_alike() -> None:
    counts = torch.zeros(50)
    for position in range(2000):
        counts[Draws(0, position).patch_ids("x", 50, 10)] += 1
    assert float((counts / 2000 - 0.2).abs().max()) < 0.04  # more than 4 standard deviations


def test_an_update_shares_its_draws() -> None:
    """Each rank and each micro-batch makes its own Draws for the update's first position."""
    first, second = Draws(3, 64), Draws(3, 64)
    first.patch_ids("something else", 99, 9)  # asking for one thing does not move the next
    assert torch.equal(first.patch_ids("ab.down1", 4096, 256), second.patch_ids("ab.down1", 4096, 256))


def test_a_sample_keeps_its_dropout_in_every_split_of_a_batch() -> None:
    shape = (8, 5, 3)
    whole = Draws(3, 64).kept("up0", torch.arange(64, 70), shape, 0.5)
    assert whole.shape == (6, *shape) and whole.dtype == torch.bool
    for first, update_position in ((64, 64), (67, 64), (67, 66)):
        part = Draws(3, update_position).kept("up0", torch.arange(first, first + 3), shape, 0.5)
        assert torch.equal(part, whole[first - 64 : first - 61])


def test_no_two_masks_of_dropout_are_the_same() -> None:
    asked = itertools.product((0, 1), ("up0", "up1"))
    masks = torch.cat([Draws(seed, 0).kept(place, torch.arange(5), (8, 8), 0.5) for seed, place in asked])
    agreeing = (masks[:, None] == masks[None]).float().mean((2, 3))
    assert float(agreeing.fill_diagonal_(0.5).sub(0.5).abs().max()) < 0.25  # 4 standard deviations of 64 coins


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9])
def test_dropout_drops_its_share(rate: float) -> None:
    kept = Draws(3, 0).kept("up0", torch.arange(100), (10, 10, 10), rate)
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.01)


def test_seed_purpose_and_position_all_matter() -> None:
    asked = itertools.product((0, 1), (0, 1, 64), ("ab.down1", "ba.down1", "ab.down2"))
    drawn = [tuple(Draws(seed, at).patch_ids(purpose, 4096, 16).tolist()) for seed, at, purpose in asked]
    assert len(set(drawn)) == len(drawn) == 18


def test_a_coin_is_fair_and_belongs_to_an_update() -> None:
    faces = [Draws(3, position).coin("flip") for position in range(2000)]
    assert abs(sum(faces) / 2000 - 0.5) < 0.05  # more than 4 standard deviations
    assert faces == [Draws(3, position).coin("flip") for position in range(2000)]
    assert faces != [Draws(4, position).coin("flip") for position in range(2000)]
    assert faces != [Draws(3, position).coin("other") for position in range(2000)]


def test_normal_numbers_belong_to_their_positions() -> None:
    draws, positions = Draws(3, 0), torch.arange(3000)
    numbers = draws.normal("code", positions, 8)
    assert (numbers.shape, numbers.dtype) == ((3000, 8), torch.float32)
    assert abs(float(numbers.mean())) < 0.03 and abs(float(numbers.std()) - 1) < 0.03
    assert torch.equal(Draws(3, 96).normal("code", positions[[7, 2]], 8), numbers[[7, 2]])
    assert not torch.equal(draws.normal("other", positions, 8), numbers)
    assert len({tuple(row) for row in numbers.tolist()}) == 3000


def test_keys_do_not_run_together() -> None:
    keys: list[tuple[int, str, tuple[int, ...]]] = [
        (1, "a", (2, 3)), (1, "a", (23,)), (1, "a", (2, 3, 0)), (12, "a", (3,)), (1, "a, 2", (3,)), (1, "a", ()),
        (1, "a', 2, '", (3,)), (-1, "a", (2, 3)),
    ]  # fmt: skip
    assert len({generator(seed, purpose, *key).integers(2**62) for seed, purpose, key in keys}) == len(keys)


def test_uniform_numbers_and_distinct_ones_belong_to_samples() -> None:
    draws, positions = Draws(3, 0), torch.arange(400)
    mixed = draws.uniform("mix", positions)
    assert mixed.dtype == torch.float32 and mixed.shape == (400,)
    assert float(mixed.min()) >= 0 and float(mixed.max()) < 1 and abs(float(mixed.mean()) - 0.5) < 0.05
    assert torch.equal(draws.uniform("mix", positions[7:9]), mixed[7:9])
    assert not torch.equal(draws.uniform("other", positions), mixed)
    cells = draws.distinct("cells", positions, 9, 2)
    assert cells.dtype == torch.int64 and cells.shape == (400, 2)
    assert bool((cells[:, 0] != cells[:, 1]).all())
    assert all(abs(int((cells == cell).sum()) - 800 / 9) < 40 for cell in range(9))
    assert torch.equal(draws.distinct("cells", positions[7:9], 9, 2), cells[7:9])
    assert sorted(draws.distinct("all", positions[:1], 9, 9)[0].tolist()) == list(range(9))


def test_integers_of_any_library_are_the_same_position() -> None:
    """A position that comes out of an array instead of a list must not draw something else."""
    expected = generator(3, "crop", 7, 2).random()
    assert generator(3, "crop", np.int64(7), np.int32(2)).random() == expected  # type: ignore[arg-type]
    assert generator(3, "crop", torch.tensor(7), 2).random() == expected  # type: ignore[arg-type]
    assert generator(np.int64(3), "crop", 7, 2).random() == expected  # type: ignore[arg-type]


def test_global_state_is_neither_used_nor_moved() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = Draws(3, 5).patch_ids("x", 100, 10)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(Draws(3, 5).patch_ids("x", 100, 10), one)


def test_another_process_draws_the_same() -> None:
    """Hash randomisation and the like have no say; and the numbers are pinned, since a run may outlive a release."""
    code = "from i2i_dist.draws import Draws; print(Draws(3, 64).patch_ids('ab.down1', 4096, 4).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(Draws(3, 64).patch_ids("ab.down1", 4096, 4).tolist())
    assert generator(3, "crop", 7).integers(1000, size=4).tolist() == PINNED


PINNED = [157, 916, 321, 203]
