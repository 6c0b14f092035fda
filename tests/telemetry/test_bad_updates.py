"""What is left behind of bad updates is one row for each rank that met one, and a few lines of the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from i2i_dist.telemetry import bad_updates
from i2i_dist.telemetry.bad_updates import BadUpdates

UPDATE = {"images_seen": 24, "update": 3, "skipped": ["generator"]}


def test_each_rank_that_met_one_has_its_row_and_few_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gathered(text: str) -> list[str]:
        return ["", *(json.dumps(json.loads(text) | {"rank": rank}) for rank in range(1, 7)), ""]

    monkeypatch.setattr(bad_updates, "gather_texts", gathered)
    keys = {"a": [f"{number}.png" for number in range(6)], "b": ["x/0.png"]}
    losses = {"gan": float("nan"), "cycle": 2.5, "nce": float("-inf")}
    with caplog.at_level(logging.WARNING, logger="i2i_dist"):
        BadUpdates(tmp_path).note(UPDATE, ["generator"], losses, keys)
    rows = [json.loads(line) for line in (tmp_path / "bad_updates.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert {name: row[name] for name in UPDATE} == UPDATE and row["keys"] == keys and row["met"] == ["generator"]
        assert row["losses"] == {"gan": None, "cycle": 2.5, "nce": None}
        assert row["nonfinite"] == ["losses.gan", "losses.nce"]
    said = "met a loss that is not finite (gan, nce); its samples: a 0.png 1.png 2.png 3.png and 2 more, b x/0.png."
    assert [record.getMessage() for record in caplog.records] == [
        *(f"Update 3: rank {rank} {said}" for rank in range(1, 5)),
        "So did 2 more ranks; they stand in bad_updates.jsonl.",
    ]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(bad_updates, "rank_and_world", lambda: (3, 4))
    monkeypatch.setattr(bad_updates, "gather_texts", lambda text: told.append(text) or [""] * 4)  # type: ignore[func-returns-value]
    one = BadUpdates(tmp_path)
    one.note(UPDATE, [], {"gan": 1.0}, {"a": ["0.png"]})
    one.note(UPDATE, ["generator"], {"gan": 1.0}, {"a": ["0.png"]})
    assert told[0] == "" and json.loads(told[1])["rank"] == 3
    assert list(tmp_path.iterdir()) == []
