"""Learning rates and averaging follow from images seen alone, with the values of the official schedules."""

from __future__ import annotations

import pytest

from i2i_dist.schedules import LinearDecay, ema_decay

DCLGAN = LinearDecay(epoch_images=1334, constant_epochs=200, decay_epochs=200, decay_step="epoch_end")
CYCLEGAN = LinearDecay(epoch_images=1334, constant_epochs=100, decay_epochs=100, decay_step="epoch_start")


def in_epoch(schedule: LinearDecay, epoch: int, image: int = 0) -> float:
    """Return the factor in an epoch counted from 1."""
    return schedule.factor((epoch - 1) * schedule.epoch_images + image)


@pytest.mark.parametrize(
    ("schedule", "epoch", "factor"),
    [
        (DCLGAN, 1, 1.0),
        (DCLGAN, 200, 1.0),
        (DCLGAN, 201, 200 / 201),
        (DCLGAN, 300, 101 / 201),
        (DCLGAN, 400, 1 / 201),
        (CYCLEGAN, 1, 1.0),
        (CYCLEGAN, 99, 1.0),
        (CYCLEGAN, 100, 100 / 101),
        (CYCLEGAN, 101, 99 / 101),
        (CYCLEGAN, 200, 0.0),
    ],
)
def test_official_values(schedule: LinearDecay, epoch: int, factor: float) -> None:
    for image in (0, 1, 700, 1333):  # one stair per epoch
        assert in_epoch(schedule, epoch, image) == pytest.approx(factor, abs=1e-15)


@pytest.mark.parametrize("step", ["epoch_end", "epoch_start"])
@pytest.mark.parametrize(("constant", "decay"), [(100, 100), (3, 5), (0, 4), (4, 0), (1, 0)])
def test_the_official_scheduler_counts_the_same(step: str, constant: int, decay: int) -> None:
    """Play the official loop: a scheduler that is stepped at one end of each epoch, with epoch_count 1."""
    schedule = LinearDecay(10, constant, decay, step)  # type: ignore[arg-type]
    steps = 0
    for epoch in range(1, constant + decay + 1):
        steps += step == "epoch_start"
        official = 1.0 - max(0, steps + 1 - constant) / (decay + 1)
        assert in_epoch(schedule, epoch) == pytest.approx(max(0.0, official), abs=1e-15)
        steps += step == "epoch_end"


def test_updates_that_cross_an_epoch_begin_in_it() -> None:
    schedule = LinearDecay(10, 1, 1, "epoch_end")
    assert [schedule.factor(images) for images in (0, 8, 9, 10, 12, 19)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", [DCLGAN, CYCLEGAN])
def test_beyond_the_end_the_last_stair_holds(schedule: LinearDecay) -> None:
    last = in_epoch(schedule, schedule.constant_epochs + schedule.decay_epochs)
    assert schedule.total_images == 1334 * (schedule.constant_epochs + schedule.decay_epochs)
    for images in (schedule.total_images - 1, schedule.total_images, schedule.total_images + 10**6):
        assert schedule.factor(images) == last


def test_it_never_rises_and_stays_between_0_and_1() -> None:
    schedule = LinearDecay(7, 3, 9, "epoch_start")
    factors = [schedule.factor(images) for images in range(schedule.total_images + 20)]
    assert factors == sorted(factors, reverse=True)
    assert (factors[0], factors[-1]) == (1.0, 0.0)


def test_nothing_is_remembered() -> None:
    """Asked in any order, and by a schedule made anew as after a resume, it says the same."""
    images = [0, 300_000, 1333, 266_800, 533_599, 12]
    assert [DCLGAN.factor(i) for i in images] == [LinearDecay(*DCLGAN).factor(i) for i in reversed(images)][::-1]
    assert DCLGAN.decay_starts == 266_800


def test_half_life_of_the_average() -> None:
    grown = 10**9
    assert ema_decay(grown, batch=500, half_life=500) == pytest.approx(0.5)
    assert ema_decay(grown, batch=1, half_life=500) ** 500 == pytest.approx(0.5)
    assert ema_decay(grown, batch=4, half_life=500) == pytest.approx(ema_decay(grown, batch=1, half_life=500) ** 4)


def test_a_young_average_forgets_the_initialisation() -> None:
    assert ema_decay(0, batch=1, half_life=10_000) == 0.0
    assert ema_decay(100, batch=5, half_life=10_000) == pytest.approx(0.5)  # a twentieth of 100 images
    decays = [ema_decay(images, batch=1, half_life=1000) for images in range(0, 40_000, 100)]
    assert decays == sorted(decays)
    assert decays[-1] == ema_decay(20_000, batch=1, half_life=1000) == pytest.approx(0.5 ** (1 / 1000))
