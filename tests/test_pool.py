"""The image pool: what goes in, what comes out, how often, and that only seed and position decide."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from i2i_dist.draws import generator
from i2i_dist.pool import ImagePools

CPU = torch.device("cpu")


class Outputs(NamedTuple):
    fake_a: Tensor
    fake_b: Tensor
    other: Tensor | None = None


def images(first: int, count: int) -> Tensor:
    """Images [N, 1, 2, 2] of which each is filled with its own number."""
    return torch.arange(first, first + count).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def feed(pools: ImagePools, first: int, count: int) -> tuple[list[int], list[int]]:
    """Show images numbered by their position, those of B negative, and return the numbers that come out."""
    shown = pools.exchange(Outputs(images(first, count), -images(first, count)), torch.arange(first, first + count))
    return [int(x) for x in shown.fake_a[:, 0, 0, 0]], [-int(x) for x in shown.fake_b[:, 0, 0, 0]]


def pools_of(size: int, seed: int = 0) -> ImagePools:
    return ImagePools(("fake_a", "fake_b"), size, seed)


def test_while_it_fills_it_returns_what_it_is_given() -> None:
    pools = pools_of(5)
    assert feed(pools, 0, 2) == ([0, 1], [0, 1])
    assert feed(pools, 2, 3) == ([2, 3, 4], [2, 3, 4])
    assert sorted(int(image[0, 0, 0]) for image in pools.images["fake_a"]) == [0, 1, 2, 3, 4]


def test_a_full_one_exchanges_or_passes_on() -> None:
    """Each image is either passed on, and the pool stays; or one from the pool comes out and it takes that place."""
    pools = pools_of(3)
    feed(pools, 0, 3)
    for position in range(3, 200):
        before = [int(image[0, 0, 0]) for image in pools.images["fake_a"]]
        (shown,), _ = feed(pools, position, 1)
        after = [int(image[0, 0, 0]) for image in pools.images["fake_a"]]
        if shown == position:
            assert after == before
        else:
            assert after == [position if number == shown else number for number in before]
            assert shown in before


def test_half_are_exchanged_and_every_place_alike() -> None:
    pools = pools_of(4)
    feed(pools, 0, 4)
    count = 4000
    exchanged, places = 0, [0] * 4
    for position in range(4, 4 + count):
        before = [int(image[0, 0, 0]) for image in pools.images["fake_a"]]
        (shown,), _ = feed(pools, position, 1)
        if shown != position:
            exchanged += 1
            places[before.index(shown)] += 1
    assert abs(exchanged / count - 0.5) < 0.03  # 4 standard deviations
    assert all(abs(place / exchanged - 0.25) < 0.04 for place in places)


def test_fields_decide_apart() -> None:
    pools = pools_of(2)
    feed(pools, 0, 2)
    a, b = feed(pools, 2, 200)
    assert a != b


def test_only_seed_and_position_decide() -> None:
    """In one batch or one by one, and whatever is drawn in between: the same comes out; another seed differs."""
    together, alone, another = pools_of(3), pools_of(3), pools_of(3, seed=1)
    torch.manual_seed(0)
    expected = feed(together, 0, 100)
    torch.manual_seed(1)
    one_by_one = [feed(alone, position, 1) for position in range(100)]
    assert ([a[0] for a, _ in one_by_one], [b[0] for _, b in one_by_one]) == expected
    assert feed(another, 0, 100) != expected


def test_the_decisions_are_those_that_the_draws_say() -> None:
    pools = pools_of(2, seed=5)
    feed(pools, 0, 2)
    for position in range(2, 50):
        stored = [int(image[0, 0, 0]) for image in pools.images["fake_b"]]
        draw = generator(5, "pool.fake_b", position)
        swap, slot = draw.random() < 0.5, int(draw.integers(2))
        _, (shown,) = feed(pools, position, 1)
        assert shown == (-stored[slot] if swap else position)


def test_state_goes_round() -> None:
    """A pool restored half way goes on as the one that was never saved."""
    whole, first, second = pools_of(3), pools_of(3), pools_of(3)
    feed(whole, 0, 20)
    feed(first, 0, 20)
    state = {field: stored.clone() for field, stored in first.state().items()}
    assert {field: tuple(stored.shape) for field, stored in state.items()} == {
        "fake_a": (3, 1, 2, 2),
        "fake_b": (3, 1, 2, 2),
    }
    feed(second, 500, 30)
    second.restore(state, CPU)
    assert feed(second, 20, 40) == feed(whole, 20, 40)


def test_an_empty_state_empties() -> None:
    pools = pools_of(3)
    assert pools.state() == {}
    feed(pools, 0, 3)
    pools.restore({}, CPU)
    assert feed(pools, 3, 3) == ([3, 4, 5], [3, 4, 5])


def test_size_0_is_no_pool() -> None:
    pools = pools_of(0)
    outputs = Outputs(images(0, 2), images(0, 2))
    assert pools.exchange(outputs, torch.arange(2)) is outputs
    assert pools.state() == {}


def test_stored_images_are_copies_without_a_graph() -> None:
    pools = pools_of(1)
    fake = images(0, 1).requires_grad_()
    other = torch.ones(1)
    shown = pools.exchange(Outputs(fake, fake, other), torch.arange(1))
    assert not shown.fake_a.requires_grad
    assert shown.other is other
    with torch.no_grad():
        fake.fill_(9.0)
    assert pools.images["fake_a"][0].unique().tolist() == [0.0]


def test_positions_and_images_are_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pools_of(2).exchange(Outputs(images(0, 2), images(0, 2)), torch.arange(1))
