"""The console tells where a run stands, and the meter's arithmetic is right."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from i2i_dist.telemetry.console import Meter, Plan, plan_text, progress_line, setup_logging
from i2i_dist.telemetry.record import UpdateRecord, memory_bytes, memory_kind

RECORD = UpdateRecord(
    images_seen=128_000,
    target_images=25_000_000,
    update=500,
    losses={"G": 2.3149, "D": 0.48, "nce": math.nan, "cam": 1234.4},
    learning_rates={"generator": 2e-4, "critic": 2e-4},
    gauges={},
    images_per_second=812.3,
    seconds_per_update=0.31,
    data_wait_share=0.031,
    data_wait_seconds=5.0,
    update_seconds=(0.31,),
    memory_bytes=41_200_000_000,
    eta_seconds=27_670.2,
)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_progress_line() -> None:
    assert progress_line(RECORD) == (
        "img 128.0k/25.0M  update 500  G 2.31 D 0.48 nce nan cam 1234"
        " | lr 2.0e-4 | 812 img/s (data 3%) | mem 41.2 GB | eta 7:41:10"
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"learning_rates": {"generator": 2e-4, "critic": 1e-5}}, "| lr generator 2.0e-4 critic 1.0e-5 |"),
        ({"learning_rates": {"generator": 0.0}}, "| lr 0 |"),
        ({"images_seen": 999_950}, "img 1.0M/"),
        ({"images_seen": 64}, "img 64/"),
        ({"images_per_second": 0.4567}, "| 0.457 img/s"),
        ({"eta_seconds": math.inf}, "| eta unknown"),
        ({"eta_seconds": 90_061.0}, "| eta 1d 01:01:01"),
        ({"losses": {}}, "update 500 | lr"),
        ({"losses": {"G": 1.0}, "gauges": {"spread": 0.0371}}, "update 500  G 1 | lr"),
    ],
)
def test_progress_line_in_corners(change: dict[str, object], part: str) -> None:
    assert part in progress_line(RECORD._replace(**change))


def test_progress_line_shows_gauges_that_are_low() -> None:
    record = RECORD._replace(losses={"G": 1.0}, gauges={"spread": 0.0371, "change": 0.8})
    assert "update 500  G 1 spread 0.0371 | lr" in progress_line(record, {"spread"})


def test_plan_text() -> None:
    plan = Plan(
        method="dclgan",
        run_directory=Path("runs/horse2zebra"),
        device="cuda",
        nodes=2,
        ranks=16,
        micro_batch=2,
        accumulation=4,
        parameters={"generator_ab": 11_378_179, "critic_a": 2_764_737},
        images_seen=12_800,
        target_images=25_000_000,
        updates=195_313,
        precision="bf16",
        zero_stages={"generator": 2, "discriminator": 1},
        offloaded=["generator"],
        recomputed=True,
        ops_backend="native",
        checkpoint_bytes=341_250_000,
        checkpoints_at_most=5,
        checkpoint_room=2 * 10**12,
    )
    assert plan.global_batch == 128
    assert "at most 5 of 341.2 MB: 1.7 GB of an unknown amount free\n" in plan_text(replace(plan, checkpoint_room=None))
    assert plan_text(plan).splitlines() == [
        "method      dclgan, bf16, ops native",
        "ranks       2 nodes, 16 ranks on cuda; ZeRO stage generator 2 offloaded, discriminator 1; blocks recomputed",
        "batch       2 micro x 4 accumulation x 16 world = 128 global",
        "parameters  generator_ab 11.4M, critic_a 2.8M; 14.1M in all",
        "length      25.0M images, 195,313 updates; resumes at image 12.8k",
        "checkpoints at most 5 of 341.2 MB: 1.7 GB of 2.0 TB free",
        "run         runs/horse2zebra",
    ]


def make_update(meter: Meter, clock: Clock, wait: float, work: float, images_seen: int) -> None:
    meter.begin()
    with meter.waiting():
        clock.now += wait
    clock.now += work
    meter.end(images_seen)


def test_meter() -> None:
    clock = Clock()
    meter = Meter(images_seen=100, target_images=200, update=7, clock=clock)
    make_update(meter, clock, 1.0, 3.0, 110)
    clock.now += 50.0  # a checkpoint: no part of the speed
    make_update(meter, clock, 0.0, 2.0, 120)
    record = meter.record({"g": 1.5, "d": 5.0}, {"generator": 1e-4}, {"spread": 0.25}, memory_bytes=42)
    assert record == UpdateRecord(
        images_seen=120,
        target_images=200,
        update=9,
        losses={"g": 1.5, "d": 5.0},
        learning_rates={"generator": 1e-4},
        gauges={"spread": 0.25},
        images_per_second=20 / 6,
        seconds_per_update=3.0,
        data_wait_share=1 / 6,
        data_wait_seconds=1.0,
        update_seconds=(4.0, 2.0),
        memory_bytes=42,
        eta_seconds=80 * 52 / 10,  # 10 images in the 52 s since the first update's end
    )
    make_update(meter, clock, 2.0, 2.0, 200)
    record = meter.record({"g": math.nan}, {}, {}, memory_bytes=0)
    assert (record.images_per_second, record.data_wait_share, record.update_seconds) == (20.0, 0.5, (4.0,))
    assert math.isnan(record.losses["g"])
    assert record.eta_seconds == 0.0


def test_meter_before_anything_is_known() -> None:
    clock = Clock()
    meter = Meter(images_seen=0, target_images=100, update=0, clock=clock)
    with pytest.raises(ValueError, match="at least one update"):
        meter.record({}, {}, {}, memory_bytes=0)
    make_update(meter, clock, 0.0, 0.0, 0)
    assert meter.record({}, {}, {}, memory_bytes=0).eta_seconds == math.inf
    make_update(meter, clock, 0.0, 2.0, 10)
    assert meter.record({}, {}, {}, memory_bytes=0).eta_seconds == 18.0


def test_memory_is_plausible() -> None:
    assert memory_kind() in ("resident", "cuda_peak")
    assert memory_kind() == "cuda_peak" or 10e6 < memory_bytes() < 1e12


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.getLogger("i2i_dist").level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    logging.getLogger("i2i_dist").setLevel(level)


def test_rank_0_writes_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], own_logging: None) -> None:
    setup_logging(0, tmp_path)
    setup_logging(0, tmp_path)  # twice must not print twice
    logging.getLogger("i2i_dist.train").info("img %d", 5)
    logging.getLogger("i2i_dist.train").warning("careful")
    logging.getLogger("another").info("chatter")
    assert capsys.readouterr().out == "img 5\nwarning: careful\n"
    text = (tmp_path / "logs" / "rank_0000.log").read_text()
    assert "INFO i2i_dist.train: img 5" in text
    assert "chatter" not in text


def test_other_ranks_are_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str], own_logging: None) -> None:
    setup_logging(3, tmp_path)
    logging.getLogger("i2i_dist.train").info("img 5")
    logging.getLogger("i2i_dist.train").error("broken")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "rank 3: error: broken\n")
    assert "img 5" in (tmp_path / "logs" / "rank_0003.log").read_text()
