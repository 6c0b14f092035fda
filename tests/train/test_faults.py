"""What a run does when a disk, a picture, a number or another rank fails it."""

from __future__ import annotations

import itertools
import json
import re
import resource
import shutil
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from i2i_dist import checkpoint
from tests.train.hooks import EQUAL, FILE_LIMIT, SLOW
from tests.train.runs import checkpoints, finish, rows, settings, start, start_ranks

LAST = f"images_{24:012d}"
EVERY_UPDATE = settings(output__checkpoint_every_images=2, output__keep_checkpoints=2)


def names(*images: int) -> list[str]:
    return [f"images_{number:012d}" for number in images]


def assert_good(run: Path, expected: list[str]) -> None:
    """The checkpoints are these, verify, and hold finite numbers alone."""
    assert checkpoints(run) == expected
    for name in expected:
        path = run / "checkpoints" / name
        checkpoint.verify(path)
        for file in path.glob("*.safetensors"):
            for key, tensor in safetensors.torch.load_file(file).items():
                assert torch.isfinite(tensor).all(), f"{name}/{file.name}: {key}"


# ----------------------------------------------------------------------------------------------------------------- disk


def test_a_full_disk_costs_the_checkpoint_and_the_run_may_recover(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *settings(schedule__constant_epochs=10), "--run", str(tmp_path / "run")]
    run = start(words, tmp_path / "log", hook="files_stay_small")
    run.wait_for("No checkpoint at image 8: ")
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.wait() == 0, run.text
    assert "File too large" in run.text and "Traceback" not in run.text
    assert checkpoints(tmp_path / "run")[-1] == f"images_{80:012d}"
    assert_good(tmp_path / "run", checkpoints(tmp_path / "run"))


def test_a_run_whose_last_checkpoint_is_not_written_claims_no_success(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), "--run", str(tmp_path / "run")]
    half = start([*words, *settings(schedule__constant_epochs=1)], tmp_path / "half")
    assert half.wait() == 0, half.text
    assert max(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors")) > FILE_LIMIT
    ranks = start_ranks(2, words, tmp_path / "log", hooks=["files_stay_small"] * 2)
    codes, (text, other) = finish(ranks)
    assert codes == [1, 1], text
    assert "at image 24, but its last checkpoint could not be written" in text
    assert "Traceback" not in text + other
    assert "Done" not in text and "Resume" not in text
    assert_good(tmp_path / "run", names(8))
    assert [row["images_seen"] for row in rows(tmp_path / "run")] == list(range(2, 25, 2))
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))


def test_a_sample_grid_that_cannot_be_written_is_no_reason_to_end(dclgan: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file where the folder should be")
    run = start(["--config", str(dclgan), "--run", str(tmp_path / "run")], tmp_path / "log")
    assert run.wait() == 0, run.text
    assert "No sample grid at image 24: " in run.text


# -------------------------------------------------------------------------------------------------------------- numbers


def bad_updates(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_updates.jsonl").read_text().splitlines()]


def test_numbers_that_stay_not_finite_end_the_run_with_good_checkpoints(dclgan: Path, tmp_path: Path) -> None:
    more = settings(train__max_bad_updates=4)
    words = ["--config", str(dclgan), *EVERY_UPDATE, *more, "--run", str(tmp_path / "run")]
    codes, (text, other) = finish(start_ranks(2, words, tmp_path / "log", hooks=["", "nan_from_update_5"]))
    assert codes == [1, 1], text
    assert "train.py: 4 updates in a row had a loss or gradient that is not finite" in text
    assert "Traceback" not in text + other
    assert other == "", "what all ranks know is said once"
    assert_good(tmp_path / "run", names(8, 10))  # neither written nor pushed out while the numbers were bad
    assert rows(tmp_path / "run")[-1]["images_seen"] == 18
    dumped = bad_updates(tmp_path / "run")
    assert [(row["update"], row["images_seen"], row["rank"]) for row in dumped] == [(n, 2 * n, 1) for n in (6, 7, 8, 9)]
    assert all(row["met"] == ["discriminator"] and row["skipped"] == ["generator", "discriminator"] for row in dumped)
    assert all(set(row["losses"]) == {"critic_a", "critic_b"} for row in dumped)
    assert "bad_updates.jsonl names the samples" in text
    for row in dumped:
        bad = [name for name, loss in row["losses"].items() if loss is None]
        assert "critic_a" in bad and row["nonfinite"] == [f"losses.{name}" for name in bad]
        (a,), (b,) = row["keys"]["a"], row["keys"]["b"]
        said = f"rank 1 met a loss that is not finite ({', '.join(bad)}); its samples: a {a}, b {b}."
        assert text.count(f"Update {row['update']}: {said}") == 1
        assert re.fullmatch(r"0000[0-5]\.png", a) and re.fullmatch(r"0000[0-5]\.png", b)


def test_a_passing_nan_costs_its_updates_and_delays_a_checkpoint(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *settings(output__checkpoint_every_images=8)]
    run, fine = (
        start(
            [*words, *settings(output__log_every_images=every), "--run", str(tmp_path / name)],
            tmp_path / f"{name}_log",
            hook="nan_in_update_3_and_in_a_gradient_of_update_4",
        )
        for name, every in (("run", 6), ("fine", 2))
    )
    assert (run.wait(), fine.wait()) == (0, 0), run.text
    assert run.text.count("is not finite at image") == 3  # of two sides, and of the generator alone
    first, second = bad_updates(tmp_path / "run")
    assert (first["update"], first["met"], second["update"], second["met"]) == (4, ["discriminator"], 5, ["generator"])
    assert second["nonfinite"] == [] and second["skipped"] == ["generator"] and "gan_ab" in second["losses"]
    said = "Update 5: rank 0 met a gradient of the generator that is not finite, its losses being so; its samples: a 0"
    assert run.text.count(said) == 1
    assert_good(tmp_path / "run", names(12, 16, 24))

    one_by_one = [row["losses"] for row in rows(tmp_path / "fine")]
    first, second, *_ = (row["losses"] for row in rows(tmp_path / "run"))
    for name, mean in first.items():
        assert mean == pytest.approx(sum(losses[name] for losses in one_by_one[:3]) / 3, rel=1e-5)
    came_as_far = [one_by_one[number]["gan_ab"] for number in (4, 5)]  # the third ended with the critics' turn
    assert second["gan_ab"] == pytest.approx(sum(came_as_far) / 2, rel=1e-5)
    assert second["critic_b"] is None


def test_a_slow_rank_is_named_and_kept_another_weight_ends_the_run_and_clocks_may_jump(
    dclgan: Path, tmp_path: Path
) -> None:
    """Two ranks work equally long, then one is slow, then it has another weight; an hour is taken from the clock."""
    more = settings(schedule__constant_epochs=20, train__drift_every_updates=1, output__checkpoint_every_images=40)
    words = ["--config", str(dclgan), *more, "--run", str(tmp_path / "run")]
    hooks = ["steady_while_the_clock_is_set_back", "slow_and_then_with_another_weight"]
    codes, (text, other) = finish(start_ranks(2, words, tmp_path / "log", hooks=hooks))
    found, host = rows(tmp_path / "run"), socket.gethostname()

    slow = [f"Rank {rank} ({host}) works at " for rank in (0, 1)]
    assert (text.count(slow[0]), text.count(slow[1])) == (0, 1), text
    assert EQUAL < text[: text.index(slow[1])].count("img ") <= SLOW
    assert found[-1]["slowest_rank"] == 1 and found[-1]["slowest_rank_score"] < 0.75
    assert all(row["slowest_rank_score"] >= 0.75 for row in found[:EQUAL])

    assert codes == [1, 1], text
    name = re.search(r"another weight: (\S+)\.\n", other)
    said = (
        f"at image 58 the generator's {name and name[1]} is not the same on all ranks: ranks 0 ({host}) and 1 ({host})"
    )
    assert f"train.py: {said} differ" in text and "Traceback" not in text + other
    assert found[-1]["update"] == SLOW, "the update was told of before it was found out"
    assert_good(tmp_path / "run", names(40))

    back = [one["timestamp_seconds"] - two["timestamp_seconds"] for one, two in itertools.pairwise(found)]
    assert 3500 < max(back) < 3600, "no hour was taken from the clock"
    page = (tmp_path / "run" / "metrics.txt").read_text()
    durations = [
        float(line.split()[1]) for line in page.splitlines() if re.match(r"i2i_\w+_seconds(_sum|_total) ", line)
    ]
    assert len(durations) == 3, page
    durations += [row[name] for row in found for name in ("seconds_per_update", "data_wait_seconds", "eta_seconds")]
    assert all(0 <= seconds < 1800 for seconds in durations)
    assert "eta -" not in text


def test_state_that_is_not_finite_is_never_saved(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *EVERY_UPDATE, "--run", str(tmp_path / "run")]
    run = start(words, tmp_path / "log", hook="infinite_weight_at_update_5")
    assert run.wait() == 1, run.text
    assert "not finite at image 12, and no checkpoint of it is kept" in run.text
    assert "Traceback" not in run.text
    assert_good(tmp_path / "run", names(8, 10))


# ------------------------------------------------------------------------------------------------- pictures and metrics


@pytest.fixture
def broken_data(data: Path, tmp_path: Path) -> Path:
    """One broken picture among the six of each domain."""
    shutil.copytree(data, tmp_path / "data")
    for domain in "AB":
        (tmp_path / "data" / f"train{domain}" / "00002.png").write_bytes(b"no picture")
    return tmp_path / "data"


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_tell_what_the_log_tells(dclgan: Path, broken_data: Path, tmp_path: Path) -> None:
    """Two ranks, a port in use, and a broken picture that each epoch of six meets once in each domain."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        more = settings(
            data__root=str(broken_data), schedule__epoch_images=6, schedule__constant_epochs=400,
            output__log_every_images=60, output__metrics_port=taken.getsockname()[1],
        )  # fmt: skip
        words = ["--config", str(dclgan), *more, "--run", str(tmp_path / "run")]
        ranks = start_ranks(2, words, tmp_path / "log")
        ranks[0].wait_for("img 60/")
        found = re.search(r"metrics: http://127\.0\.0\.1:(\d+)/metrics \(port (\d+) is in use", ranks[0].text)
        assert found and int(found[2]) == taken.getsockname()[1] != int(found[1])
        seen = equal = 0.0
        deadline = time.monotonic() + 60
        while not equal and time.monotonic() < deadline:  # a page may be rendered in the middle of an update of it
            page = scrape(int(found[1]))
            if images := page["i2i_train_images_seen"]:
                row = next(row for row in rows(tmp_path / "run") if row["images_seen"] == images)
                losses = {f'i2i_train_loss{{name="{name}"}}': value for name, value in row["losses"].items()}
                replaced = [page.get(f'i2i_data_bad_samples_total{{domain="{domain}"}}', 0.0) for domain in "ab"]
                if losses.items() <= page.items() and replaced == [images / 6, images / 6]:
                    seen, equal = images, page["i2i_train_images_total"]
        assert seen == equal > 0, f"the page never agreed with stats.jsonl:\n{page}"
        ranks[0].signal(signal.SIGTERM)
        codes, texts = finish(ranks)
    assert codes == [75, 75], texts[0]
    for domain in "ab":  # once, though it was met once an epoch on either rank
        assert sum(text.count(f"Replaced sample 00002.png of domain {domain}: ") for text in texts) in (1, 2)


def test_broken_pictures_cost_no_update(dclgan: Path, broken_data: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *settings(data__root=str(broken_data)), "--run", str(tmp_path / "run")]
    run = start(words, tmp_path / "log")
    assert run.wait() == 0, run.text
    assert "Replaced sample 00002.png of domain a: not an image" in run.text
    assert [row["images_seen"] for row in rows(tmp_path / "run")] == list(range(2, 25, 2))
    assert "metrics:" not in run.text  # metrics_port is null


# --------------------------------------------------------------------------------------------------------- another rank


def test_an_error_of_one_rank_is_told_and_ends_all(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), "--run", str(tmp_path / "run")]
    ranks = start_ranks(2, words, tmp_path / "log", hooks=["", "nothing_can_be_read"])
    codes, (text, other) = finish(ranks)  # the timeout of collectives is half an hour: waiting for it fails here
    assert codes == [1, 1]
    assert "train.py: rank 1: 100 samples in a row of domain 'a'" in other and "broken on purpose" in other
    assert "train.py: rank 0: another rank has ended, and this one cannot go on alone" in text
    assert "Traceback" not in text + other


def test_a_data_set_that_one_rank_lacks_ends_all(dclgan: Path, data: Path, tmp_path: Path) -> None:
    here = ["--config", str(dclgan), "--run", str(tmp_path / "run")]
    lacking = [*here, *settings(data__root=str(tmp_path / "nowhere"))]
    codes, (text, other) = finish(start_ranks(2, [here, lacking], tmp_path / "lacking"))
    assert codes == [2, 2]
    assert f"train.py: rank 1: The folder {tmp_path / 'nowhere' / 'trainA'} is not there" in text
    assert other == ""

    shutil.copytree(data, tmp_path / "less")
    (tmp_path / "less" / "trainA" / "00000.png").unlink()
    less = [*here, *settings(data__root=str(tmp_path / "less"))]
    codes, (text, other) = finish(start_ranks(2, [here, less], tmp_path / "less_log"))
    assert codes == [2, 2]
    assert "rank 1 finds other images (5 of domain a, 6 of b) than rank 0 (6 and 6)" in text
    assert other == ""


def test_an_unforeseen_error_ends_the_run_and_its_readers(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *settings(data__workers=2), "--run", str(tmp_path / "run")]
    run = start(words, tmp_path / "log", hook="error_at_update_3")
    assert run.wait(patience=30) == 1
    assert "KeyError: 'unforeseen'" in run.text
    run.wait_until_gone(patience=10)
