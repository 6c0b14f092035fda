"""The slowest rank is found by its own work, among two ranks and among thousands."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from i2i_dist import pace
from i2i_dist.pace import WINDOW, Pace, moment, scores
from tests.needs import DEVICES


def test_scores_compare_with_the_median_of_the_others() -> None:
    assert scores([0.2, 0.4]) == [2.0, 0.5]  # of two ranks the median would be half the slow one
    assert scores([0.2, 0.8, 0.2]) == pytest.approx([2.5, 0.25, 2.5])
    seconds = torch.rand(101, generator=torch.Generator().manual_seed(0)).add(0.1).tolist()
    seconds[7] = seconds[8]
    for few in (seconds[:4], seconds[:5], seconds):
        expected = [statistics.median(few[:rank] + few[rank + 1 :]) / own for rank, own in enumerate(few)]
        assert scores(few) == pytest.approx(expected)


def test_nobody_is_slow_where_nothing_is_known() -> None:
    assert scores([0.3]) == [1.0]
    assert scores([0.3, 0.0]) == [1.0, 1.0]


def test_a_hiccup_does_not_make_a_rank_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    device = torch.device("cpu")
    own = Pace(device)
    for number in range(3 * WINDOW):
        own.begin()
        now += 60.0 if number % 3 == 0 else 0.5
        own.end(moment(device))
        now += 5.0  # the rest of the update, in which ranks wait for each other
        assert own.seconds() == (0.5 if number + 1 >= WINDOW else 0.0)


@pytest.mark.parametrize("name", DEVICES)
def test_time_is_that_of_the_device(name: str) -> None:
    device = torch.device(name)
    x = torch.ones(640, 640, device=device)

    def seconds(products: int) -> float:
        own, begun = Pace(device), time.perf_counter()
        for _ in range(WINDOW):
            own.begin()
            for _ in range(products):
                torch.mm(x, x)  # a GPU is told of it in microseconds, and works for longer
            own.end(moment(device))
        found = own.seconds()
        assert 0 < WINDOW // 2 * found <= time.perf_counter() - begun, "half of the updates took at least the median"
        return found

    seconds(1)  # libraries are loaded
    assert seconds(8) > seconds(1)
