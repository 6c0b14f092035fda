"""The order is a pure function of the position, and visits everything once an epoch."""

from __future__ import annotations

import pytest

from i2i_dist.data.order import SampleOrder


@pytest.mark.parametrize("counts", [[7, 10, 0, 10, 10], [1], [300], [64] * 5])
def test_epoch_covers_each_sample_once(counts: list[int]) -> None:
    order = SampleOrder(counts, seed=1, domain="a", block=4, window=3)
    total = sum(counts)
    epochs = [[order.index(e * total + i) for i in range(total)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * total
        assert sorted(i for _, i in epoch) == list(range(total))
    if total > 1:
        assert epochs[0] != [(0, i) for _, i in epochs[1]]


def test_order_is_independent_of_what_was_asked_before() -> None:
    def order() -> SampleOrder:
        return SampleOrder([50, 31], seed=3, domain="a", block=8, window=2)

    walked = order()
    forwards = [walked.index(i) for i in range(500)]
    backwards = [walked.index(i) for i in reversed(range(500))]
    assert forwards == backwards[::-1] == [order().index(i) for i in range(500)]


def test_domains_and_seeds_have_orders_of_their_own() -> None:
    def first(seed: int, domain: str) -> list[int]:
        order = SampleOrder([100], seed, domain)
        return [order.index(i)[1] for i in range(100)]

    assert first(1, "a") == first(1, "a")
    assert first(1, "a") != first(1, "b")
    assert first(1, "a") != first(2, "a")


def test_blocks_and_samples_are_both_drawn_anew() -> None:
    def order(domain: str, epoch: int, block: int) -> list[int]:
        drawn = SampleOrder([50], 0, domain, block=block, window=1)
        return [drawn.index(50 * epoch + i)[1] for i in range(50)]

    for block in (1, 50):  # only the blocks' order, and only the samples' order inside a block
        assert len({tuple(order(domain, epoch, block)) for domain in "ab" for epoch in range(2)}) == 4


def test_reads_stay_within_a_window_of_blocks() -> None:
    order = SampleOrder([1000] * 4, seed=0, domain="a", block=10, window=5)
    drawn = [order.index(i)[1] for i in range(50)]
    assert len({i // 10 for i in drawn}) == 5
    assert drawn != sorted(drawn)


def test_any_position_of_a_large_data_set_is_reached_at_once() -> None:
    order = SampleOrder([10_000] * 1200, seed=0, domain="a")
    epoch, sample = order.index(3 * 12_000_000 + 6_000_000)
    assert epoch == 3 and 0 <= sample < 12_000_000


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' holds no samples"):
        SampleOrder([0, 0], seed=0, domain="a")
