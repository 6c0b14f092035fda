"""The log of statistics is valid JSON whatever happens, and follows a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from i2i_dist.telemetry.jsonl import StatsLog
from i2i_dist.telemetry.record import UpdateRecord


def record(images_seen: int, loss: float = 1.0) -> UpdateRecord:
    return UpdateRecord(
        images_seen, 1000, images_seen // 10, {"generator": loss, "critic": 0.5}, {"generator": 2e-4},
        {"spread": loss}, 100.0, 0.1, 0.25, 0.025, (0.1,), 123, math.inf if math.isnan(loss) else 9.0,
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_row_of_a_record(tmp_path: Path) -> None:
    log = StatsLog(tmp_path / "run" / "stats.jsonl")
    log.append(record(10))
    (row,) = rows(log.path)
    assert row["losses"] == {"generator": 1.0, "critic": 0.5}
    assert row["gauges"] == {"spread": 1.0}
    assert row["nonfinite"] == []
    assert row["data_wait_share"] == 0.25
    assert "update_seconds" not in row


def test_nonfinite_values_are_null_and_named_and_keys_are_stable(tmp_path: Path) -> None:
    log = StatsLog(tmp_path / "stats.jsonl")
    log.append(record(10))
    log.append(record(20, loss=math.nan))
    log.append({"images_seen": 20, "fid": [1.0, -math.inf]})
    first, second, third = rows(log.path)
    assert list(first) == list(second)
    assert second["losses"] == {"generator": None, "critic": 0.5}
    assert second["nonfinite"] == ["losses.generator", "gauges.spread", "eta_seconds"]
    assert third["fid"] == [1.0, None]
    assert third["nonfinite"] == ["fid.1"]


def test_refuses_a_row_without_its_clock(tmp_path: Path) -> None:
    log = StatsLog(tmp_path / "stats.jsonl")
    with pytest.raises(ValueError, match="images_seen"):
        log.append({"fid": 3.0})


def test_truncates_beyond_the_resumed_point_and_torn_rows(tmp_path: Path) -> None:
    log = StatsLog(tmp_path / "stats.jsonl")
    for images_seen in (10, 20, 30, 40):
        log.append(record(images_seen))
    whole = log.path.read_bytes().splitlines(keepends=True)
    with log.path.open("ab") as file:
        file.write(b"\x00\xff\x00\n" + whole[0][:-1])  # what a crash leaves; the last lacks only its newline
    assert log.truncate_after(20) == 4
    assert log.path.read_bytes() == b"".join(whole[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.jsonl"]
    log.append(record(30))
    assert [row["images_seen"] for row in rows(log.path)] == [10, 20, 30]
    assert log.truncate_after(30) == 0


def test_truncating_nothing(tmp_path: Path) -> None:
    assert StatsLog(tmp_path / "stats.jsonl").truncate_after(0) == 0


def test_full_disk_costs_the_row_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    log = StatsLog(tmp_path / "stats.jsonl")
    log.append(record(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, hard))
        log.append(record(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "a row at image 20 was lost" in caplog.text
    log.append(record(30))
    assert [row["images_seen"] for row in rows(log.path)] == [10, 30]
