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
from tests.ranks import free_port, rank_environment
from tests.train.hooks import EQUAL, FILE_LIMIT, SLOW
from tests.train.runs import checkpoints, finish, rows, settings, start, start_ranks

LAST = f"images_{24:012d}"
EVERY_UPDATE = settings(output__checkpoint_every_images=2, output__keep_checkpoints=2)


def assert_good(run: Path, last: int) -> None:
    """There are checkpoints, none beyond `last` images; they verify, and hold finite numbers alone."""
    assert checkpoints(run) and checkpoints(run)[-1] <= f"images_{last:012d}"
    for name in checkpoints(run):
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
    assert_good(tmp_path / "run", 80)


def test_a_disk_full_on_one_rank_is_counted_by_rank_0_and_forgotten(dclgan: Path, tmp_path: Path) -> None:
    more = settings(
        schedule__constant_epochs=400, output__checkpoint_every_images=8, output__keep_checkpoints=500,
        output__metrics_port=0,
    )  # fmt: skip
    words = ["--config", str(dclgan), *more, "--run", str(tmp_path / "run")]
    ranks = start_ranks(2, words, tmp_path / "log", hooks=["", "disk_full_in_second_checkpoint"])
    ranks[0].wait_for("rank 1: No space left on device")
    port = re.search(r"metrics: http://127\.0\.0\.1:(\d+)/metrics", ranks[0].text)
    assert port
    deadline = time.monotonic() + 60
    while (page := scrape(int(port[1])))["i2i_checkpoint_duration_seconds_count"] < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # one before the failure and one after
    failures = {name: value for name, value in page.items() if name.startswith("i2i_checkpoint_failures_total")}
    ranks[0].signal(signal.SIGTERM)
    codes, (text, other) = finish(ranks)
    assert codes == [75, 75], text
    assert {name for name, value in failures.items() if value} == {'i2i_checkpoint_failures_total{reason="enospc"}'}
    assert sum(failures.values()) == 1
    assert page["i2i_checkpoint_pause_seconds_count"] == page["i2i_checkpoint_duration_seconds_count"] + 1
    assert "Traceback" not in text + other and text.count("No checkpoint at image ") == 1
    failed = re.search(
        r"No checkpoint at image (\d+): rank 1: No space left on device\. Those before it are kept", text
    )
    assert failed and f"images_{int(failed[1]):012d}" not in checkpoints(tmp_path / "run")
    assert checkpoints(tmp_path / "run")[0] == f"images_{8:012d}"
    assert_good(tmp_path / "run", 3200)
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))


def test_a_rank_that_dies_before_all_is_written_leaves_the_checkpoint_before(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), "--run", str(tmp_path / "run")]
    ranks = start_ranks(2, words, tmp_path / "log", hooks=["", "dies_with_its_share_of_second_checkpoint"])
    codes, (text, _) = finish(ranks)
    assert codes == [1, -signal.SIGKILL], text
    assert checkpoints(tmp_path / "run") == [f"images_{8:012d}"]
    assert list((tmp_path / "run" / "checkpoints").glob(".writing-images_*")), "death came before anything was written"
    codes, (text, _) = finish(start_ranks(2, words, tmp_path / "resumed_log"))
    assert codes == [0, 0] and "resumes at image 8" in text
    assert checkpoints(tmp_path / "run")[-1] == LAST
    assert_good(tmp_path / "run", 24)
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize(
    "hooks", [["", "disk_hangs_in_second_checkpoint"], ["disk_hangs_where_second_checkpoint_is_created", ""]]
)
def test_a_run_does_not_wait_for_ever_for_a_disk_that_hangs(dclgan: Path, tmp_path: Path, hooks: list[str]) -> None:
    words = ["--config", str(dclgan), *settings(engine__timeout_seconds=12), "--run", str(tmp_path / "run")]
    codes, (text, _) = finish(start_ranks(2, words, tmp_path / "log", hooks=hooks))
    assert codes == [1, 1], text
    reason = f"rank {int(hooks[0] == '')}: the disk has not answered for 12 s"
    assert re.search(rf"No checkpoint at image \d+: {reason}\. Those before it are kept\.", text)
    assert f"at image 24, but its last checkpoint could not be written ({reason})" in text
    assert checkpoints(tmp_path / "run") == [f"images_{8:012d}"]


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
    assert checkpoints(tmp_path / "run") == [f"images_{8:012d}"]
    assert_good(tmp_path / "run", 8)
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
    assert_good(tmp_path / "run", 10)  # neither written nor pushed out while the numbers were bad
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
    said = (
        "Update 5: rank 0 met a gradient of the generator that is not finite, though all its losses are finite; "
        "its samples: a 0"
    )
    assert run.text.count(said) == 1
    page = (tmp_path / "run" / "metrics.txt").read_text()
    for side, count in (("generator", 2.0), ("discriminator", 1.0)):
        assert f'i2i_train_skipped_updates_total{{side="{side}"}} {count}\n' in page
    state = dict(re.findall(r"before update (\d+: \w+) (\w+)", run.text))
    for part in ("generator", "discriminator", "pools"):
        assert state[f"2: {part}"] != state[f"3: {part}"] == state[f"4: {part}"]
    assert state["4: discriminator"] != state["5: discriminator"]
    for part in ("generator", "pools"):
        assert state[f"4: {part}"] == state[f"5: {part}"] != state[f"6: {part}"]
    averaged = [int(images) for images in re.findall(r"averaged at image (\d+)", run.text)]
    assert averaged == [2, 4, 6, *range(12, 25, 2)]
    assert checkpoints(tmp_path / "run")[0] == f"images_{12:012d}"  # not at 8
    assert_good(tmp_path / "run", 24)

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
    assert_good(tmp_path / "run", 40)

    back = [one["timestamp_seconds"] - two["timestamp_seconds"] for one, two in itertools.pairwise(found)]
    assert 3500 < max(back) < 3600, "no hour was taken from the clock"
    page = (tmp_path / "run" / "metrics.txt").read_text()
    durations = [
        float(line.split()[1]) for line in page.splitlines() if re.match(r"i2i_\w+_seconds(_sum|_total) ", line)
    ]
    assert len(durations) == 4, page
    durations += [row[name] for row in found for name in ("seconds_per_update", "data_wait_seconds", "eta_seconds")]
    assert all(0 <= seconds < 1800 for seconds in durations)
    assert "eta -" not in text


def test_state_that_is_not_finite_is_never_saved(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *EVERY_UPDATE, "--run", str(tmp_path / "run")]
    run = start(words, tmp_path / "log", hook="infinite_weight_at_update_5")
    assert run.wait() == 1, run.text
    told = r"not finite at image (\d+) \(rank 0: generator exp_avg_sq/\S+\), and no checkpoint of it is kept"
    found = re.search(told, run.text)
    assert found and int(found[1]) >= 12
    assert "Traceback" not in run.text
    assert_good(tmp_path / "run", 10)


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


def test_an_error_of_one_rank_is_told_first_and_ends_all(dclgan: Path, tmp_path: Path) -> None:
    """Both write to the same console, as under a launcher."""
    words, port = ["--config", str(dclgan), "--run", str(tmp_path / "run")], free_port()
    hooks = ("", "nothing_can_be_read")
    ranks = [start(words, tmp_path / "log", rank_environment(rank, 2, port), hooks[rank]) for rank in (0, 1)]
    codes, (text, _) = finish(ranks)  # the timeout of collectives is half an hour: waiting for it fails here
    assert codes == [1, 1]
    own = text.index("train.py: rank 1: 100 samples in a row of domain 'a'")
    other = text.index("train.py: rank 0: another rank has ended, and this one cannot go on alone")
    assert own < text.index("broken on purpose") < other
    assert "Traceback" not in text
    assert "Traceback" in (log := log_of(tmp_path / "run", 1)) and "ValueError: 100 samples in a row" in log


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
    assert "train.py: rank 0: KeyError: 'unforeseen'" in run.text
    log = log_of(tmp_path / "run", 0)
    assert "Traceback" in log and 'hooks.py", line' in log and "KeyError: 'unforeseen'" in log
    run.wait_until_gone(patience=10)


def log_of(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank_{rank:04}.log").read_text()


# Sharded, so that a rank is missed in every pass of the generator; see hooks.small_parameters_are_cut.
THREE_RANKS = settings(
    train__global_batch=3, schedule__epoch_images=9, schedule__constant_epochs=5000,
    engine__generator_stage=3, engine__discriminator_stage=2,
)  # fmt: skip
CUT = ["small_parameters_are_cut"] * 3


def test_a_killed_rank_ends_the_others(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), *THREE_RANKS, "--run", str(tmp_path / "run")]
    ranks = start_ranks(3, words, tmp_path / "log", hooks=CUT)
    ranks[0].wait_for("img 9/")
    ranks[1].signal(signal.SIGKILL)
    begun = time.monotonic()
    assert [ranks[rank].wait() for rank in (0, 2)] == [1, 1]
    taken = time.monotonic() - begun
    print(f"a killed rank: the others had ended after {taken:.1f} s")
    assert taken <= 15
    for rank in (0, 2):
        (line,) = [line for line in ranks[rank].text.splitlines() if "train.py:" in line]
        assert "another rank has ended, and this one cannot go on alone" in line
        log = log_of(tmp_path / "run", rank)
        assert log.count("another rank has ended") == 1 and "in loop" in log and "All threads:" in log


@pytest.mark.parametrize(
    "dead, elsewhere", [(1, ()), (1, (2,)), (0, (1, 2))], ids=["one machine", "two machines", "the store's machine"]
)
def test_a_dead_rank_ends_those_whose_collectives_never_end(
    dclgan: Path, tmp_path: Path, dead: int, elsewhere: tuple[int, ...]
) -> None:
    hooks = ["hears_nothing_on_another_machine" if r in elsewhere else "hears_nothing_from_update_5" for r in range(3)]
    hooks[dead] = "dies_at_update_5"
    words = ["--config", str(dclgan), *THREE_RANKS, "--run", str(tmp_path / "run")]
    ranks = start_ranks(3, words, tmp_path / "log", hooks)
    assert ranks[dead].wait() == -signal.SIGKILL
    begun = time.monotonic()
    others = [rank for rank in range(3) if rank != dead]
    assert [ranks[rank].wait(patience=15) for rank in others] == [1, 1]
    print(f"a dead rank of which nothing is heard: the others had ended after {time.monotonic() - begun:.1f} s")
    for rank in others:
        sentence = f"rank {rank}: rank {dead} on {socket.gethostname()} has ended, and this one cannot go on alone"
        (line,) = [line for line in ranks[rank].text.splitlines() if "train.py:" in line]
        assert sentence in line
        log = log_of(tmp_path / "run", rank)
        assert log.index(sentence) < log.index("All threads:") < log.index("hooks.py") and "in loop" in log
    alone = re.findall(r"has no pidfd: ([^.]*)\. If one dies", ranks[0].text)
    assert alone == {(): [], (2,): ["2"], (1, 2): ["0"]}[elsewhere]


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(dclgan: Path, tmp_path: Path) -> None:
    """And when it wakes up it ends as well."""
    seconds = 8
    words = ["--config", str(dclgan), *THREE_RANKS, *settings(engine__timeout_seconds=seconds)]
    ranks = start_ranks(3, [*words, "--run", str(tmp_path / "run")], tmp_path / "log", hooks=CUT)
    ranks[0].wait_for("img 9/")
    ranks[1].signal(signal.SIGSTOP)
    begun = time.monotonic()
    codes = [ranks[rank].wait() for rank in (0, 2)]
    taken = time.monotonic() - begun
    print(f"a rank that hangs: the others had ended after {taken:.1f} s of {seconds}")
    assert codes == [1, 1] and taken <= seconds
    time.sleep(max(0.0, seconds - taken))
    ranks[1].signal(signal.SIGCONT)
    assert ranks[1].wait() == 1, ranks[1].text
    for rank in range(3):
        log = log_of(tmp_path / "run", rank)
        assert "Traceback" in log and "All threads:" in log and "_explain" in log
        assert log.count("another rank ") == 1
        assert "Traceback" not in ranks[rank].text
    # The first to give up names the reason; the others may only see it go.
    assert any("another rank does not answer" in ranks[rank].text for rank in (0, 2))


def test_two_runs_on_one_machine(dclgan: Path, tmp_path: Path) -> None:
    """The same port for metrics: the second takes another. The same directory: the third is refused."""
    port = free_port()
    words = ["--config", str(dclgan), *settings(schedule__constant_epochs=5000, output__metrics_port=port)]
    first = start([*words, "--run", str(tmp_path / "first")], tmp_path / "first_log")
    first.wait_for("img 8/")
    second = start([*words, "--run", str(tmp_path / "second")], tmp_path / "second_log")
    third = start([*words, "--run", str(tmp_path / "first")], tmp_path / "third_log")
    assert third.wait() == 1
    assert f"--run {tmp_path / 'first'} is in use by process {first.pid} on " in third.text
    second.wait_for("img 8/")
    assert f"http://127.0.0.1:{port}/metrics" in first.text
    found = re.search(r"metrics: http://127\.0\.0\.1:(\d+)/metrics \(port (\d+) is in use", second.text)
    assert found and int(found[2]) == port != int(found[1])
    for run in (first, second):
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.text
