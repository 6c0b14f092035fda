"""Reading processes that may be killed or hang: they are replaced, and what they read still comes in order, once.

torch's DataLoader starts the processes and keeps their order. What it does when one is lost does not suit training: in
the main thread it handles SIGCHLD by raising in the middle of whatever runs, be it an optimizer's step or a collective
that other ranks wait for; and it waits for ever for a process that hangs. So a thread of its own takes micro-batches
from it, in which torch handles no signal, and training waits for that thread with a limit. Taking a tensor from a
stopped process may block for ever, and so may shutting down a loader whose process was killed while it held a lock:
the thread is then left behind, and training goes on with new processes.

The processes are forked while other threads of the trainer run: the metrics server, the writer of checkpoints, those of
the collectives. Only the forking thread goes on in the child, and a lock that another one held stays locked there for
ever. Python and the C library set their own locks right after a fork; beyond that a reading process only reads files,
decodes pictures and computes with small arrays on one thread, and touches neither CUDA nor communicators. One that
meets such a lock after all is one that hangs, and is replaced.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from i2i_dist.data.batch import HostBatch

MAX_RESTARTS = 5  # in a row without a single micro-batch
_LOOK_SECONDS = 0.2  # how often a wait for data looks whether the processes still live
_ENDING_SECONDS = 5.0  # for processes that are told to end, before they are killed
_READY = 2  # micro-batches taken from the processes before training asks for them

_log = logging.getLogger("i2i_dist.data")
Item: TypeAlias = HostBatch | str  # a text is a worker's message to the user, in place of what it could not read


class _Lost(Exception):  # noqa: N818 - what happened, in the words of the log
    """A reading process has ended or gives nothing."""


class _Readers:
    """One set of reading processes, and the thread that takes their micro-batches."""

    def __init__(self, items: Dataset[Item], workers: int) -> None:
        self._processes: list[BaseProcess] = []
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[Item | Exception] = queue.SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(
            target=self._serve, args=(items, workers, device), name="i2i-reading", daemon=True
        )
        self._thread.start()
        for _ in range(_READY):
            self._wanted.put(True)

    def _serve(self, items: Dataset[Item], workers: int, device: int | None) -> None:
        if device is not None:  # of this thread: pinned memory would otherwise open a context on the first device
            torch.cuda.set_device(device)
            torch.set_num_threads(1)
        loader = DataLoader(
            items,
            batch_size=None,  # an item is a whole micro-batch already
            collate_fn=_as_it_is,
            num_workers=workers,
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # else it draws from the process's generator, and workers change results
        )
        try:
            iterator = self._start(loader)
            while self._wanted.get():
                item = next(iterator)
                self._given.put(item.pinned() if device is not None and isinstance(item, HostBatch) else item)
        except StopIteration:
            pass
        except Exception as error:
            self._given.put(self._what_happened(error))

    def _start(self, loader: DataLoader[Item]) -> Iterator[Item]:
        before = multiprocessing.active_children()
        try:
            iterator = iter(loader)
        except OSError as error:  # torch leaves those that it has started
            self._processes = [process for process in multiprocessing.active_children() if process not in before]
            raise _Lost(f"they could not be started ({error.strerror})") from None
        self._processes = list(iterator._workers)  # type: ignore[attr-defined]  # nothing public tells their order
        return iterator

    def _what_happened(self, error: Exception) -> Exception:
        """Tell a lost process from an error that a process or torch has met.

        The error of a loader that has lost a process stays in this thread: its traceback holds the loader, which is
        shut down by whoever lets go of it last, and that may take for ever.
        """
        if isinstance(error, _Lost):
            return _Lost(str(error))
        ending = multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=1.0)
        for process in self._processes:
            if process.sentinel in ending:
                process.join(timeout=1.0)  # its files close a moment before it has ended
        ended = self._ended()
        return _Lost(ended) if ended else error

    def _ended(self) -> str:
        """Say which processes have ended, and how; nothing where all live."""
        codes = {process.pid: process.exitcode for process in self._processes if process.exitcode is not None}
        return ", ".join(f"process {pid} {_how_it_ended(code)}" for pid, code in codes.items())

    def take(self, number: int, timeout_seconds: float) -> Item:
        """Return the next item, which is the `number`-th of these processes.

        Raises:
            _Lost: A process has ended, or gave nothing for too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                item = self._given.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if ended := self._ended():
                    raise _Lost(ended) from None
                if time.monotonic() > deadline:
                    whose = self._whose(number)
                    raise _Lost(f"{whose} gave nothing for {timeout_seconds:g} s, as when a read hangs") from None
                continue
            self._wanted.put(True)
            if isinstance(item, Exception):
                raise item
            return item

    def _whose(self, number: int) -> str:
        if not self._processes:
            return "starting them"
        return f"process {self._processes[number % len(self._processes)].pid}"

    def end(self, patience: float) -> None:
        """End the processes: kill those that have not ended by themselves after so many seconds."""
        self._wanted.put(False)
        self._thread.join(timeout=patience)
        for process in self._processes:
            process.kill()  # they ignore milder signals, and a stopped one gets no other
        for process in self._processes:
            process.join(timeout=1.0)


def loaded(items: Dataset[Item], workers: int, timeout_seconds: float, restarted: Callable[[], None]) -> Iterator[Item]:
    """Yield the items in order, read ahead by processes; where one of them is lost, all are replaced.

    Args:
        items: What is read, by number; its length is known.
        workers: How many processes read.
        timeout_seconds: For an item that training waits for; a process that takes longer counts as hanging.
        restarted: Called each time that the processes are replaced.

    Raises:
        ValueError: The processes were lost `MAX_RESTARTS` times in a row, and not one item came in between.
    """
    done, in_vain, count = 0, 0, len(items)  # type: ignore[arg-type]
    while done < count:
        readers, first = _Readers(Subset(items, range(done, count)), workers), done
        patience = _ENDING_SECONDS
        try:
            while done < count:
                item = readers.take(done - first, timeout_seconds)
                done, in_vain = done + 1, 0
                yield item
        except _Lost as lost:
            patience, in_vain = 0.0, in_vain + 1
            if in_vain > MAX_RESTARTS:
                raise ValueError(_advice(lost)) from None
            _log.warning("Reading starts again, with %d new processes: %s.", workers, lost)
        finally:
            readers.end(patience)
        if patience == 0.0:
            restarted()
            time.sleep(in_vain - 1)  # where memory is short, others may need a moment to give some back


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"has ended with exit code {code}"
    guess = {signal.SIGKILL: ", as by a system that is short of memory", signal.SIGBUS: ", as where /dev/shm is full"}
    number = signal.Signals(-code)
    return f"was killed by {number.name}{guess.get(number, '')}"


def _advice(lost: _Lost) -> str:
    return (
        f"The reading processes were lost {MAX_RESTARTS + 1} times in a row before any of them gave a micro-batch, the "
        f"last time because {lost}. Where memory is short, lower data.workers or train.micro_batch; where a read "
        "hangs, mend the file system, or raise data.worker_timeout_seconds if it is only slow. With --set "
        "data.workers=0 the training process reads by itself, and shows what is wrong."
    )


def _as_it_is(item: Any) -> Any:
    """Take the place of the loader's collation, which would turn tuples into lists."""
    return item


def _leave_signals_to_the_parent(_worker: int) -> None:
    # What is sent to the whole process group is for the trainer to answer: it finishes its update, for which it needs
    # its workers, and ends them itself. They also end when it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
