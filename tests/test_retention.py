"""What stays of the checkpoints, which one is the best, and what they will take on the disk."""

from __future__ import annotations

import errno
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from i2i_dist import retention, saver
from i2i_dist.checkpoint import directory_name, newest_verified
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep, Room, Scores, checkpoint_bytes, free_bytes
from tests.test_checkpoint import NoAverage, filled_pools, hidden, plain_sides, save, visible


def saved(directory: Path, images: list[int], last: int, scores: dict[int, float] | None = None, **keep: Any) -> None:
    for seen in images:
        score = {"loss": scores[seen]} if scores and seen in scores else {}
        assert save(directory, seen, keep=last, scores=score, **keep) is None
        found, skipped = newest_verified(directory)
        assert found == directory / directory_name(seen) and not skipped, "the newest is never removed"


def test_the_first_of_each_stretch_stays_for_ever(tmp_path: Path) -> None:
    saved(tmp_path, [30, 60, 90, 120, 150, 180, 210, 240], last=2, every=100)
    assert visible(tmp_path) == [120, 210, 240]  # 210 is both: the first from 200 on, and one of the last two
    saved(tmp_path, [270, 300, 330], last=1, every=100)
    assert visible(tmp_path) == [120, 210, 300, 330]
    assert hidden(tmp_path) == []


def test_the_best_stays_and_is_named(tmp_path: Path) -> None:
    scores = {10: 5.0, 20: 2.0, 30: 3.0, 40: 2.0, 60: 2.5}  # 50 was not measured
    saved(tmp_path, [10, 20, 30, 40, 50, 60], last=1, scores=scores, best="loss")
    assert visible(tmp_path) == [20, 60]
    assert (tmp_path / "best").read_text() == f"{directory_name(20)}\n"
    saved(tmp_path, [70], last=1, scores={70: 1.5}, best="loss")
    assert visible(tmp_path) == [70]
    assert (tmp_path / "best").read_text() == f"{directory_name(70)}\n"
    assert (tmp_path / "latest").read_text() == f"{directory_name(70)}\n"


def test_another_measure_takes_over_with_what_was_measured_before(tmp_path: Path) -> None:
    for seen, loss, other in ((10, 1.0, 9.0), (20, 2.0, 5.0), (30, 3.0, 7.0)):
        assert save(tmp_path, seen, keep=3, scores={"loss": loss, "other": other}, best="loss") is None
    assert save(tmp_path, 40, keep=1, scores={"loss": 4.0, "other": 6.0}, best="other") is None
    assert visible(tmp_path) == [20, 40]
    assert save(tmp_path, 50, keep=1) is None
    assert visible(tmp_path) == [50]
    assert not (tmp_path / "best").exists(), "it would name what is gone"


DAMAGES = {
    "half a file": ("state.json", "{", None),
    "scores of another kind": ("state.json", '"scores": {', '"scores": 7, "scorfs": {'),
    "a score of another kind": ("state.json", '"loss": 1.0', '"loss": "1"'),
    "no images seen": ("state.json", '"images_seen"', '"images_sedn"'),
    "no numbers of a side": ("state.json", '"generator"', '"generatos"'),
    "a format of another name": ("manifest.json", '"format"', '"gormat"'),
    "a format of another kind": ("manifest.json", '"format": 2', '"format": "2"'),
    "a format that never was": ("manifest.json", '"format": 2', '"format": 0'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_not_the_best_and_costs_no_later_one(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, [10, 20], last=2, scores={10: 1.0, 20: 2.0}, best="loss")
    name, was, becomes = DAMAGES[damage]
    file = tmp_path / directory_name(10) / name
    text = file.read_text()
    assert was in text
    file.write_text(was if becomes is None else text.replace(was, becomes))
    saved(tmp_path, [30], last=1, scores={30: 3.0}, best="loss")
    assert visible(tmp_path) == [20, 30]


@pytest.mark.parametrize(
    ("keep", "interval", "expected"),
    [
        (Keep(3), 10, 4),  # with the one being written
        (Keep(3, every=250), 10, 8),
        (Keep(3, best="loss"), 10, 5),
        (Keep(3), 500, 2),  # there are no more
        (Keep(3), 5000, 1),  # at the end
    ],
)
def test_how_many_lie_there_at_once(keep: Keep, interval: int, expected: int) -> None:
    assert keep.at_most(1000, interval) == expected


def test_no_more_lie_there_than_was_foretold(tmp_path: Path) -> None:
    for number, (last, every, best) in enumerate(itertools.product((1, 2), (None, 40), (None, "loss"))):
        directory, keep = tmp_path / str(number), Keep(last, every, best)
        most = 0
        for seen in range(10, 130, 10):
            most = max(most, 1 + len(visible(directory)))  # while it is written, nothing is removed yet
            assert save(directory, seen, keep=last, scores={"loss": seen % 7}, every=every, best=best) is None
        assert most <= keep.at_most(120, 10)


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "later"])
def test_the_size_is_known_beforehand(tmp_path: Path, steps: int) -> None:
    """To a few bytes of the header, where digits of offsets differ; the JSON files are not in it."""
    captured = saver.capture(plain_sides(1, steps=steps), NoAverage())  # type: ignore[arg-type]
    foretold = checkpoint_bytes(captured, ImagePools(("fake_a", "fake_b"), 2, seed=0), (3, 4, 4), world=1)
    assert save(tmp_path, 100, seed=1) is None
    actual = sum(file.stat().st_size for file in (tmp_path / directory_name(100)).glob("*.safetensors"))
    assert filled_pools(1).size == 2
    assert abs(foretold - actual) <= 64


def test_room_counts_what_older_ones_will_give_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(retention.shutil, "disk_usage", lambda path: Usage)
    assert free_bytes(tmp_path / "not" / "there" / "yet") == 1000
    assert save(tmp_path, 100) is None
    held = sum(file.stat().st_size for file in (tmp_path / directory_name(100)).iterdir())
    assert free_bytes(tmp_path) == 1000 + held
    assert Room(100, 10, 1000).fits and not Room(101, 10, 1000).fits


@pytest.mark.parametrize("call", ["disk_usage", "is_dir"])
def test_room_that_the_system_does_not_tell_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(retention.shutil if call == "disk_usage" else Path, call, refuse)
    assert free_bytes(tmp_path) is None
    assert Room(100, 10, None).fits


def test_scores_are_means_since_they_were_taken() -> None:
    scores = Scores()
    assert scores.take() == {}
    scores.note({"a": 1.0, "b": math.nan}, updates=1)
    scores.note({"a": 4.0, "b": 2.0, "c": math.inf}, updates=3)
    assert scores.take() == {"a": 13 / 4, "b": 2.0}
    scores.note({"a": 7.0}, updates=2)
    assert json.loads(json.dumps(scores.take())) == {"a": 7.0}
