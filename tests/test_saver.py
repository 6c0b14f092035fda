"""A checkpoint is written while training goes on, holds what was there when it was begun, and fails alone."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from i2i_dist import publishing, saver
from i2i_dist.checkpoint import State, directory_name, newest_verified, verify
from i2i_dist.retention import Keep
from i2i_dist.saver import NOT_FINITE, Failure, Saver
from tests.needs import DEVICES
from tests.test_architecture import imported_modules
from tests.test_checkpoint import (
    CONFIG,
    NoAverage,
    everything,
    filled_pools,
    hidden,
    plain_sides,
    restored,
    same,
    save,
    visible,
)


def begin(mine: Saver, images_seen: int, sides: Any, pools: Any) -> None:
    state = State(images_seen, 1, 1, CONFIG, {}, {})
    mine.begin(state, saver.capture(sides, NoAverage()), pools, time.monotonic())  # type: ignore[arg-type]


def new_saver(directory: Path, device: str = "cpu") -> Saver:
    return Saver(directory, Keep(3), torch.device(device))


def next_phase(mine: Saver) -> None:
    """Wait until the phase under way is over, and enter the next."""
    while mine.flags[0]:
        time.sleep(0.01)
    assert mine.advance(*mine.flags) is None


class Held:
    """Lets no piece be written before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.threads, real = threading.Event(), set[str](), os.pwrite

        def pwrite(*arguments: Any) -> int:
            self.threads.add(threading.current_thread().name)
            assert self.go.wait(60)
            return real(*arguments)

        monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go.set()


@pytest.mark.parametrize("device", DEVICES)
def test_training_goes_on_and_the_checkpoint_holds_what_was(tmp_path: Path, held: Held, device: str) -> None:
    sides, pools = plain_sides(1, device=device), filled_pools(1, device)
    mine = new_saver(tmp_path, device)
    before = everything(sides, pools)
    begin(mine, 100, sides, pools)
    for side in sides.values():  # training, which changes all in place
        for tensor in side.module.state_dict().values():
            tensor.add_(1)
        for state in side.optimizer.state.values():
            state["exp_avg"].add_(1)
    for images in pools.images.values():
        images[0].add_(1)
    next_phase(mine)
    assert mine.busy and mine.flags == (True, False)
    assert mine.advance(True, False) is None
    assert visible(tmp_path) == [] and len(hidden(tmp_path)) == 1
    held.go.set()
    outcome = mine.finish()
    assert outcome is not None and outcome.failure is None and outcome.images_seen == 100
    assert not mine.busy and held.threads == {"i2i-saver"}
    assert not same(everything(sides, pools), before)
    assert same(restored(tmp_path / directory_name(100)), {key: value.cpu() for key, value in before.items()})


def test_the_pause_is_the_copy_and_the_duration_is_all(tmp_path: Path, held: Held) -> None:
    mine = new_saver(tmp_path)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    threading.Timer(1.0, held.go.set).start()
    outcome = mine.finish()
    assert outcome is not None
    assert outcome.paused < outcome.seconds - 0.9


def test_one_after_the_other_with_pools_that_grow(tmp_path: Path) -> None:
    mine = new_saver(tmp_path)
    for number in (1, 2, 3):
        sides, pools = plain_sides(number), filled_pools(number)
        pools.images["fake_a"] = pools.images["fake_a"] * number
        begin(mine, number, sides, pools)
        with pytest.raises(AssertionError, match="one save at a time"):
            begin(mine, 9, sides, pools)
        assert mine.finish() is not None and mine.finish() is None
        assert same(restored(tmp_path / directory_name(number)), everything(sides, pools))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "enospc"),
        (errno.EDQUOT, "edquot"),
        (errno.EFBIG, "efbig"),
        (errno.EIO, "eio"),
        (errno.EROFS, "erofs"),
        (errno.EACCES, "other"),
        (None, "other"),
    ],
)
@pytest.mark.parametrize("phase", ["create", "write_share", "_write_text"])
def test_a_failure_is_named_and_costs_this_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, kind: str, phase: str
) -> None:
    assert save(tmp_path, 100) is None
    real = getattr(publishing, phase)

    def fail(*arguments: Any) -> None:
        real(*arguments)
        raise OSError(number, os.strerror(number)) if number else OSError("something else")

    mine = new_saver(tmp_path)
    monkeypatch.setattr(publishing, phase, fail)
    begin(mine, 200, plain_sides(1), filled_pools(1))
    outcome = mine.finish()
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.kind == kind
    assert outcome.failure.reason == f"rank 0: {os.strerror(number) if number else 'something else'}"
    assert newest_verified(tmp_path) == (tmp_path / directory_name(100), [])
    assert hidden(tmp_path) == []
    monkeypatch.undo()
    begin(mine, 300, plain_sides(1), filled_pools(1))
    outcome = mine.finish()
    assert outcome is not None and outcome.failure is None
    assert visible(tmp_path) == [100, 300]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    assert save(tmp_path, 100) is None
    sides, mine = plain_sides(1), new_saver(tmp_path)
    next(iter(sides["discriminator"].optimizer.state.values()))["exp_avg"].view(-1)[-1] = value
    begin(mine, 200, sides, filled_pools(1))
    outcome = mine.finish()
    assert outcome is not None
    assert outcome.failure == Failure(NOT_FINITE, "rank 0: discriminator exp_avg/0.weight")
    assert visible(tmp_path) == [100] and hidden(tmp_path) == []


def test_a_mistake_in_the_thread_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: Any) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(publishing, "write_share", mistaken)
    mine = new_saver(tmp_path)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    with pytest.raises(KeyError, match="a mistake"):
        mine.finish()


def test_who_leaves_for_an_error_publishes_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), publishing.publish

    def slow(*arguments: Any) -> None:
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(publishing, "publish", slow)
    mine = new_saver(tmp_path)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    next_phase(mine)
    next_phase(mine)
    threading.Timer(0.3, go.set).start()
    mine.leave()
    verify(tmp_path / directory_name(100))
    new_saver(tmp_path).leave()  # nothing to wait for


def test_who_leaves_waits_for_no_share_that_can_no_longer_be_published(tmp_path: Path, held: Held) -> None:
    mine = new_saver(tmp_path)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    next_phase(mine)
    begun = time.monotonic()
    mine.leave()
    assert time.monotonic() - begun < saver._LEAVING_SECONDS / 2
    assert mine.flags == (True, False)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "i2i-saver")


def test_who_leaves_does_not_wait_for_ever_to_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saver._LEAVING_SECONDS < 10, "after the death of a rank all others end within 15 s"
    go = threading.Event()
    monkeypatch.setattr(saver, "_LEAVING_SECONDS", 0.2)
    monkeypatch.setattr(publishing, "publish", lambda *_: go.wait(60))
    mine = new_saver(tmp_path)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    next_phase(mine)
    next_phase(mine)
    mine.leave()
    assert mine.flags == (True, False)
    go.set()


PHASES = ["create", "write_share", "publish"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_disk_that_hangs_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """Whatever it hangs in; when it answers again, the checkpoint is published."""
    assert save(tmp_path, 100) is None
    go, hangs, real = threading.Event(), threading.Event(), getattr(publishing, phase)

    def slow(*arguments: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        hangs.set()
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(publishing, phase, slow)
    mine = new_saver(tmp_path)
    begin(mine, 200, plain_sides(1), filled_pools(1))
    for _ in range(PHASES.index(phase)):
        next_phase(mine)
    assert hangs.wait(60)
    for _ in range(3):  # updates
        assert mine.flags == (True, False) and mine.advance(*mine.flags) is None
    assert mine.busy
    assert newest_verified(tmp_path) == (tmp_path / directory_name(100), [])
    go.set()
    assert (outcome := mine.finish()) is not None and outcome.failure is None
    assert visible(tmp_path) == [100, 200] and hidden(tmp_path) == []


@pytest.mark.parametrize("phase", PHASES)
def test_a_disk_that_hangs_is_told_of_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    assert save(tmp_path, 50) is None
    go = threading.Event()
    monkeypatch.setattr(publishing, phase, lambda *_: go.wait(60))
    monkeypatch.setattr(saver, "_REMINDER_SECONDS", 0.2)
    mine = Saver(tmp_path, Keep(3), torch.device("cpu"), patience=1)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    outcome = mine.finish()
    assert outcome is not None
    assert outcome.failure == Failure("other", "rank 0: the disk has not answered for 1 s")
    told = [record.getMessage() for record in caplog.records]
    assert 2 <= len(told) <= 5, "one after each 0.2 s of 1"
    assert all(text.startswith("The checkpoint at image 100 waits for the disk of rank 0, for ") for text in told)
    assert mine.busy, "its thread may still read the copies"
    assert mine.finish() is None
    assert newest_verified(tmp_path) == (tmp_path / directory_name(50), [])
    begun = time.monotonic()
    mine.leave()
    assert time.monotonic() - begun < saver._LEAVING_SECONDS / 2
    go.set()


def test_a_slow_disk_beside_training_is_told_of_once(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver, "_SLOW_SECONDS", 0.2)
    mine = new_saver(tmp_path)
    begin(mine, 100, plain_sides(1), filled_pools(1))
    next_phase(mine)
    mine.advance(True, False)
    assert not caplog.records
    time.sleep(0.3)
    for _ in range(3):
        mine.advance(True, False)
    held.go.set()
    assert (outcome := mine.finish()) is not None and outcome.failure is None
    assert len(caplog.records) == 1


def test_ranks_talk_on_the_main_thread_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[threading.Thread] = set()
    for name in ("any_rank", "from_first_rank", "gather_texts"):
        real = getattr(saver, name)

        def noted(argument: Any, real: Any = real) -> Any:
            threads.add(threading.current_thread())
            return real(argument)

        monkeypatch.setattr(saver, name, noted)
    assert save(tmp_path, 100) is None
    assert threads == {threading.main_thread()}
    for module in (publishing, publishing.canonical, publishing.retention):
        assert module.__file__ is not None
        talking = {"i2i_dist.distributed", "torch.distributed", "torch.cuda"} & set(
            imported_modules(Path(module.__file__))
        )
        assert not talking, f"{module.__name__} runs on the thread that writes"
