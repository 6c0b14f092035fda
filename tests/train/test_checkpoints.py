"""What a run keeps of its checkpoints, and that it goes on from them wherever it is killed."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from i2i_dist import checkpoint
from tests.train.runs import checkpoints, finish, rows, settings, start, start_ranks


def test_the_last_some_and_the_best_stay_and_the_room_is_told(dclgan: Path, tmp_path: Path) -> None:
    run, measure = tmp_path / "run", "gan_ab"
    more = settings(
        schedule__constant_epochs=9, output__keep_checkpoints=1, output__keep_every_images=24, output__keep_best=measure
    )
    process = start(["--config", str(dclgan), *more, "--run", str(run)], tmp_path / "log", hook="little_room")
    assert process.wait() == 0, process.text
    assert re.search(r"\ncheckpoints at most 6 of \d+\.\d kB: \d\.\d MB of 1\.0 kB free\n", process.text)
    assert re.search(r"warning: 6 checkpoints of \d+\.\d kB will not fit into the 1\.0 kB that are free", process.text)
    saved = [int(images) for images in re.findall(r"Saved \S+images_(\d+)\. It took ", process.text)]
    assert len(saved) > 4 and saved[-1] == 72
    scores = {}
    for before, images in zip([0, *saved], saved, strict=False):
        values = [row["losses"][measure] for row in rows(run) if before < row["images_seen"] <= images]
        scores[images] = sum(values) / len(values)
    lasting = {next(images for images in saved if images >= every) for every in (24, 48, 72)}
    best = min(scores, key=lambda images: scores[images])
    assert checkpoints(run) == [f"images_{images:012d}" for images in sorted({*lasting, best, 72})]
    assert (run / "checkpoints" / "best").read_text() == f"images_{best:012d}\n"
    for name in checkpoints(run):
        state = checkpoint.read_state(run / "checkpoints" / name)
        assert state.scores[measure] == pytest.approx(scores[state.images_seen], rel=1e-6)


@pytest.mark.soak
def test_on_four_ranks_two_one_and_four_a_run_sees_what_one_rank_sees(dclgan: Path, tmp_path: Path) -> None:
    """A leg of two updates each, at other ZeRO stages; the losses are a fingerprint of the images."""
    slowly = settings(method__lr=1e-7, method__lr_heads=1e-7, method__pool_size=0, train__global_batch=4)
    words = ["--config", str(dclgan), *slowly]

    def train(world: int, epochs: int, name: str, stage: int) -> None:
        more = settings(
            schedule__constant_epochs=epochs, engine__generator_stage=stage, engine__discriminator_stage=3 - stage
        )
        log = tmp_path / f"{name}_{epochs}"
        ranks = start_ranks(world, [*words, *more, "--run", str(tmp_path / name)], log, hooks=[""] * world)
        codes, texts = finish(ranks)
        assert codes == [0] * world, texts

    train(1, 8, "whole", 0)
    for epochs, (world, stage) in enumerate(((4, 3), (2, 1), (1, 2), (4, 0)), start=1):
        train(world, 2 * epochs, "legs", stage)
    whole, legs = rows(tmp_path / "whole"), rows(tmp_path / "legs")
    assert [row["images_seen"] for row in legs] == [row["images_seen"] for row in whole] == list(range(4, 65, 4))
    for update, row in enumerate(whole):
        apart = [max(abs(row["losses"][name] - other["losses"][name]) for name in row["losses"]) for other in legs]
        assert apart[update] < 1e-3
        assert min(apart[:update] + apart[update + 1 :]) > 5e-3


@pytest.mark.soak
@pytest.mark.timeout(3400)
def test_killed_while_it_saves_a_run_goes_on_to_the_same_end(dclgan: Path, tmp_path: Path) -> None:
    """Two ranks that save all the time; both of them, or one, are killed 50 times."""
    run, whole, kills, torn, chance = tmp_path / "run", tmp_path / "whole", 0, 0, random.Random(4)
    wider = {"method__width": 16, "method__critic_width": 16, "schedule__constant_epochs": 150}
    words = ["--config", str(dclgan), *settings(output__checkpoint_every_images=2, **wider)]
    ranks = start_ranks(2, [*words, "--run", str(whole)], tmp_path / "whole_log")
    assert [rank.wait(patience=1200) for rank in ranks] == [0, 0]
    while kills < 50:
        ranks = start_ranks(2, [*words, "--run", str(run)], tmp_path / f"log_{kills}")
        ranks[0].wait_for("Saved ")
        time.sleep(chance.uniform(0, 0.2))
        for rank in chance.choice([ranks, ranks[:1], ranks[1:]]):
            rank.signal(signal.SIGKILL)
        codes, (text, _) = finish(ranks)
        assert -signal.SIGKILL in codes and 0 not in codes, "the run was over before it could be killed"
        assert ("resumes at image" in text) == (kills > 0), text
        assert "Skipped checkpoint" not in text and "Traceback" not in text, text
        found, skipped = checkpoint.newest_verified(run / "checkpoints")
        assert found is not None and not skipped
        torn, kills = torn + bool(list((run / "checkpoints").glob(".writing-images_*"))), kills + 1
    assert torn >= 15, "death has to come in the middle of a save"
    ranks = start_ranks(2, [*words, "--run", str(run)], tmp_path / "last_log")
    assert [rank.wait(patience=1200) for rank in ranks] == [0, 0]
    assert "resumes at image" in ranks[0].text
    assert not list((run / "checkpoints").glob(".writing-*"))
    last = checkpoints(whole)[-1]
    assert checkpoints(run)[-1] == last
    for file in sorted((whole / "checkpoints" / last).glob("*.safetensors")):
        assert file.read_bytes() == (run / "checkpoints" / last / file.name).read_bytes(), file.name
