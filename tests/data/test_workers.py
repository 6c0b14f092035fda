"""Reading processes are killed, stopped and refused; what is read stays the same, and nothing is left behind."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from i2i_dist.data import workers as workers_module
from i2i_dist.data.batch import HostBatch
from i2i_dist.data.reader import Reader, micro_batches
from i2i_dist.data.transforms import Transform
from i2i_dist.data.workers import MAX_RESTARTS
from tests.data.builders import reader_of, write_folder

JITTER = Transform(load_size=12, crop_size=8, flip=True, full_size_from=None)
UPDATES = 60
BATCH = 8  # the global batch: two micro-batches of a rank in each update, at most
killed: set[str] = set()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "trainA", 7, seed=1)
    write_folder(root / "trainB", 5, seed=2)
    return root


@pytest.fixture
def reader(root: Path) -> Reader:
    return reader_of(root, transform=JITTER)


def read(reader: Reader, rank: int = 0, world: int = 1, start: int = 0, **more: Any) -> Iterator[HostBatch]:
    sizes = {"global_batch": BATCH, "micro_batch": 2 if world > 1 else 4, "rank": rank, "world": world, "start": start}
    return micro_batches(reader, **{"stop": BATCH * UPDATES, "workers": 0} | sizes | more)


def content(batch: HostBatch) -> bytes:
    """Which pictures they are, where they were cut, and for which positions."""
    return b"".join([batch.positions.numpy().tobytes(), *(batch.images[d].numpy().tobytes() for d in "ab")])


def trace(batches: Iterator[HostBatch]) -> list[bytes]:
    return [content(batch) for batch in batches]


def left() -> tuple[set[str], set[int], set[int | None]]:
    """What reading processes could leave: files in shared memory, processes (zombies too), threads."""
    files = {path.name for path in Path("/dev/shm").glob("torch_*")}
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    families = {str(os.getpid()), *map(str, children)}
    threads = {thread.ident for thread in threading.enumerate()}
    return {name for name in files if name.split("_")[1] in families | killed}, children, threads


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever was killed in these tests; torch looks every five seconds, so they wait for it once."""
    before = left()
    yield
    deadline = time.monotonic() + 60
    while any(now - then for now, then in zip(left(), before, strict=True)):
        assert time.monotonic() < deadline, left()
        time.sleep(0.05)


def processes() -> list[int]:
    return sorted(process.pid for process in multiprocessing.active_children() if process.pid is not None)


def send(number: int, which: int = 0) -> int:
    pid = processes()[which]
    killed.add(str(pid))
    os.kill(pid, number)
    return pid


# ----------------------------------------------------------------------------------------------------- killed and stuck


def test_a_killed_process_is_replaced_and_the_order_goes_on(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    """As by the system when memory is short; at random places, either of two processes."""
    expected, chance, restarts, found, waits, pids = trace(read(reader)), random.Random(0), [0], [], [], []
    at = set(chance.sample(range(5, 2 * UPDATES - 20), 5))

    def restarted() -> None:
        restarts[0] += 1

    begun = 0.0
    for number, batch in enumerate(read(reader, workers=2, restarted=restarted)):
        if restarts[0] > len(waits):
            waits.append(time.monotonic() - begun)
        found.append(content(batch))
        if number in at:
            assert len(waits) == len(pids), "the places are too close"
            begun = time.monotonic()
            pids.append(send(signal.SIGKILL, chance.randrange(2)))
    assert found == expected
    assert restarts == [5] and max(waits) < 10
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [re.findall(r"process (\d+) was killed by SIGKILL", message) for message in messages] == [
        [str(pid)] for pid in pids
    ]


def test_a_stuck_process_is_replaced_and_the_order_goes_on(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    """As on a read that hangs. It is stopped while pictures of it wait to be fetched, which would hang as well."""
    expected, found, count = trace(read(reader)), [], [0]

    def restarted() -> None:
        count[0] += 1

    for number, batch in enumerate(read(reader, workers=2, worker_timeout_seconds=1, restarted=restarted)):
        found.append(content(batch))
        if number == 20:
            begun, pid = time.monotonic(), send(signal.SIGSTOP)
        if count == [1] and number >= 20 and begun:
            seconds, begun = time.monotonic() - begun, 0.0
    assert found == expected and count == [1]
    assert seconds < 1 + 10
    [message] = [record.getMessage() for record in caplog.records]
    assert f"process {pid} gave nothing for 1 s" in message


def test_a_process_lost_during_an_update_does_not_disturb_it(reader: Reader) -> None:
    """Nothing may be raised in the middle of an optimizer's step, nor the program's signals be handled by others."""
    handler, batches = signal.getsignal(signal.SIGCHLD), read(reader, workers=2)
    found = [content(next(batches))]
    send(signal.SIGKILL)
    for _ in range(200):  # an update
        time.sleep(0.001)
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert found + trace(batches) == trace(read(reader))


def test_reading_ends_at_once_although_a_process_is_stuck(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_ENDING_SECONDS", 0.2)
    batches = read(reader, workers=2)
    next(batches)
    for which in range(2):
        send(signal.SIGSTOP, which)
    begun = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 10
    assert not processes()


# ------------------------------------------------------------------------------------------------------ again and again


class _Faulty(Reader):
    """Does something else instead of reading, from the fourth update on."""

    def __init__(self, root: Path, fault: Callable[[], None]) -> None:
        self.fault = fault
        sources = reader_of(root)._sources
        super().__init__(sources, seed=5, transform=JITTER)

    def read(self, positions: range, update_position: int, *more: Any) -> HostBatch:
        if update_position >= 3 * BATCH:
            self.fault()
        return super().read(positions, update_position, *more)


def test_processes_lost_again_and_again_end_training_with_a_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(workers_module.time, "sleep", pauses.append)
    reader = _Faulty(root, lambda: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(
        ValueError, match=r"lost 6 times in a row .* killed by SIGBUS, as where /dev/shm is full\. Where"
    ):
        list(read(reader, workers=1))
    assert len(caplog.records) >= MAX_RESTARTS and pauses[-MAX_RESTARTS:] == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's, of a loader half made
def test_processes_that_cannot_be_started_are_tried_again(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, refusals = os.fork, iter([True, False, True])

    def fork() -> int:
        if next(refusals, False):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(workers_module.time, "sleep", lambda _: None)
    assert trace(read(reader, workers=2)) == trace(read(reader))
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "they could not be started (Resource temporarily unavailable)."
    ] * 2


def test_an_error_of_the_program_is_none_of_a_process(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fault() -> None:
        raise KeyError("unforeseen")

    batches = read(_Faulty(root, fault), workers=2)
    with pytest.raises(KeyError, match="unforeseen"), contextlib.closing(batches):  # type: ignore[type-var]
        list(batches)
    assert not caplog.records


# ---------------------------------------------------------------------------------------------- resumes and collectives


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_a_resume_goes_on_with_the_same_pictures_on_other_ranks_and_processes(reader: Reader) -> None:
    """Five random places, three numbers of ranks, three numbers of reading processes: each two of them meet."""
    stop = 20 * BATCH
    whole = by_position([list(read(reader, stop=stop))])
    assert list(whole) == list(range(stop))
    worlds = (1, 2, 4)
    for number, update in enumerate(random.Random(15).sample(range(1, 20), 5)):
        rest = {position: picture for position, picture in whole.items() if position >= update * BATCH}
        turn = (worlds[number % 3], 1), (worlds[(number + 1) % 3], 4)
        for world, workers in (*((world, 0) for world in worlds), *turn):
            ranks = [
                list(read(reader, rank, world, start=update * BATCH, stop=stop, workers=workers))
                for rank in range(world)
            ]
            assert by_position(ranks) == rest, (update, world, workers)


def by_position(ranks: list[list[HostBatch]]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for batch in (batch for rank in ranks for batch in rank):
        for row, position in enumerate(batch.positions.tolist()):
            assert position not in found
            found[position] = b"".join(batch.images[domain][row].numpy().tobytes() for domain in "ab")
    return dict(sorted(found.items()))


def test_no_rank_ends_before_another_whatever_the_sizes_of_the_domains(root: Path, tmp_path: Path) -> None:
    """A thousand updates of three ranks over 7 and 5 pictures, whose epochs end within an update as often as not."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_steps, args=(root, rank, 3, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [str(list(range(1000)))] * 3


def _steps(root: Path, rank: int, world: int, directory: Path) -> None:
    """Read on one rank, with a collective in each update, and write down which updates all ranks were in."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    updates: list[float] = []
    sizes = {"global_batch": world, "micro_batch": 1, "stop": 1000 * world, "workers": rank % 2}
    for batch in read(reader_of(root), rank, world, **sizes):
        places = batch.positions.sum()
        torch.distributed.all_reduce(places)
        updates.append((places.item() - 3) / 9)  # 3 u + (3 u + 1) + (3 u + 2) = 9 u + 3
    (directory / str(rank)).write_text(str([int(update) if update.is_integer() else update for update in updates]))
    torch.distributed.destroy_process_group()
