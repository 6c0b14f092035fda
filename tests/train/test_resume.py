"""A run that is killed and resumed ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.train.runs import checkpoints, finish, rows, settings, start_ranks

LONG = settings(schedule__constant_epochs=16, output__checkpoint_every_images=24, output__keep_checkpoints=50)
TARGET = 16 * 8


def test_restarted_at_once_although_readers_outlive_the_killed_trainer(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", dclgan, *LONG, *settings(data__workers=2), "--run", tmp_path / "run"]
    (killed,) = start_ranks(1, words, tmp_path / "killed_log")
    killed.wait_for("Saved ")
    killed.signal(signal.SIGKILL)
    assert finish([killed])[0] == [-9]
    codes, (text,) = finish(start_ranks(1, words, tmp_path / "restarted_log"))
    assert codes == [0] and "resumes at image" in text


@pytest.mark.parametrize(("method", "stages"), [("dclgan", (3, 2)), ("cyclegan", (0, 1))])
def test_killed_and_resumed_equals_uninterrupted(
    method: str, stages: tuple[int, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config, hooks = request.getfixturevalue(method), ["small_parameters_are_cut"] * 2
    more = [*LONG, *settings(engine__generator_stage=stages[0], engine__discriminator_stage=stages[1])]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = ["--config", config, *more, "--run"]
    codes, texts = finish(start_ranks(2, [*words, whole], tmp_path / "whole_log", hooks))
    assert codes == [0, 0], texts

    words.append(killed)
    ranks = start_ranks(2, words, tmp_path / "killed_log", hooks)
    ranks[0].wait_for("Saved ")
    time.sleep(random.Random(method).uniform(0.0, 0.3))
    for rank in ranks:
        rank.signal(signal.SIGKILL)
    assert finish(ranks)[0] == [-9, -9], "the run was over before it could be killed"
    with (killed / "stats.jsonl").open("a") as file:
        file.write('{"images_seen": 9, "tor')  # a row that the kill has torn

    codes, (text, _) = finish(start_ranks(2, words, tmp_path / "resumed_log", hooks))
    assert codes == [0, 0]
    assert "resumes at image" in text

    last = f"images_{TARGET:012d}"
    assert checkpoints(killed)[-1] == last == checkpoints(whole)[-1]
    files = sorted(path.name for path in (whole / "checkpoints" / last).glob("*.safetensors"))
    pools = ["pool_rank_0000.safetensors", "pool_rank_0001.safetensors"]
    assert files == ["discriminator.safetensors", "generator.safetensors", *pools]
    for name in files:
        one, other = (run / "checkpoints" / last / name for run in (whole, killed))
        assert one.read_bytes() == other.read_bytes(), name
    early = whole / "checkpoints" / f"images_{24:012d}" / "generator.safetensors"
    assert early.read_bytes() != (whole / "checkpoints" / last / "generator.safetensors").read_bytes()
    expected = [(row["images_seen"], row["update"], row["losses"]) for row in rows(whole)]
    assert [(row["images_seen"], row["update"], row["losses"]) for row in rows(killed)] == expected
    assert [images for images, _, _ in expected] == list(range(2, TARGET + 1, 2))
