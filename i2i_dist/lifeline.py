"""Ends this rank when another one has died, also where the communication library says nothing of it.

Gloo closes its connections, so that the collectives of the others fail at once. NCCL does not tell of a process that
has died on the same machine: the others wait in a collective, where Python handles no signal. So a thread of each rank
watches the processes of the ranks on its machine, and another one a key of the process group's store, by which those
on other machines learn of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from i2i_dist import stacks, supervise
from i2i_dist.distributed import Ranks, gather_texts
from i2i_dist.exit_codes import FAILED
from i2i_dist.processes import begin_of

# Seconds that the main thread has for ending by itself: its own error says more, and a checkpoint may be published.
PATIENCE = 8.0
# Seconds. An answer costs the store 9 us of a CPU: 4,096 ranks take a twenty-fifth of one core from rank 0's machine.
_LOOK_EVERY = 1.0
_KEY = "i2i_dist/lost"  # in the store: the number of a rank that has died
_log = logging.getLogger("i2i_dist.lifeline")


class Lifeline:
    """Ends this rank a while after another one has died, unless its main thread has done so by then."""

    def __init__(self, ranks: Ranks) -> None:
        """Begin to watch. Collective."""
        self._rank, self._lost, self._cut = ranks.rank, -1, False
        self._noticed = threading.Event()
        if ranks.world == 1:
            return
        own = [socket.gethostname(), _process_table(), os.getpid(), begin_of(os.getpid())]
        all_ranks = [json.loads(text) for text in gather_texts(json.dumps(own))]
        self._hosts: list[str] = [host for host, *_ in all_ranks]
        self._watched: dict[int, int] = {}  # file descriptor -> rank
        for rank, (_, table, pid, begin) in enumerate(all_ranks):
            if rank != ranks.rank and table == own[1] and (process := _open(pid, begin)) is not None:
                self._watched[process] = rank
        watched = [rank for text in gather_texts(json.dumps([*self._watched.values()])) for rank in json.loads(text)]
        if ranks.rank == 0 and (alone := sorted({*range(ranks.world)} - {*watched})):
            _log.info(
                "No other process sees whether these ranks live, each alone on its machine or in its container, or "
                "under a kernel that has no pidfd: %s. If one dies the others learn of it by the communication library "
                "alone, or after engine.timeout_seconds.",
                ", ".join(map(str, alone[:8])) + (f" and {len(alone) - 8} more" if len(alone) > 8 else ""),
            )
        # A connection of its own: what one thread asks of a store must not wait for what another one does.
        store: Any = dist.distributed_c10d._get_default_store()  # torch's types know neither the class nor `clone`
        threading.Thread(target=self._watch, name="i2i-lifeline", daemon=True).start()
        threading.Thread(target=self._ask, args=(store.clone(),), name="i2i-lifeline-store", daemon=True).start()

    def cut(self) -> None:
        """Say that the rank is about to end in order, before it waits for the others to say so.

        None of them has ended in order before all have said so. Whoever was noticed before this has died.
        """
        self._cut = True

    def _watch(self) -> None:
        """Notice the death of a rank on this machine. A thread: the store's may wait for a rank 0 that hangs."""
        poll = select.poll()
        for process in self._watched:
            poll.register(process, select.POLLIN)
        while self._lost < 0:
            ended = poll.poll(1000 * _LOOK_EVERY)
            if self._cut and self._lost < 0:
                return
            if ended:
                self._lost = min(self._watched[process] for process, _ in ended)
        self._noticed.set()
        time.sleep(PATIENCE)
        self._end()

    def _ask(self, store: Any) -> None:
        """Learn from the store of a death on another machine, and tell it of one on this."""
        # With torchrun the store is often its own. Of its loss `stopping` tells, and the run ends in order.
        of_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not self._noticed.wait(_LOOK_EVERY) and not self._cut:
            try:
                lost = int(store.get(_KEY)) if store.check([_KEY]) else -1
            except RuntimeError:  # the store is gone, and so is the process that kept it
                if not of_rank_0:
                    return
                lost = 0
            if lost >= 0 and not self._cut:
                self._lost = lost
                return
        if self._noticed.is_set() and not (of_rank_0 and self._lost == 0):
            # Mostly all ranks end at once, by an error of all or of gloo: then there is no one to tell, and no store.
            time.sleep(_LOOK_EVERY)
            with contextlib.suppress(RuntimeError):
                store.set(_KEY, str(self._lost))

    def _end(self) -> None:
        host = self._hosts[self._lost]
        lost = f"rank {self._lost} on {host} has ended, and this one cannot go on alone"
        sentence = f"train.py: rank {self._rank}: {lost}"
        stacks.write(None, sentence)
        supervise.report(FAILED)
        with contextlib.suppress(OSError):  # the console may be gone
            print(sentence, file=sys.stderr, flush=True)
        os._exit(FAILED)


def _process_table() -> str:
    """Name what a process id holds for: a machine, or a container that counts its own."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _open(pid: int, begin: int) -> int | None:
    """Return a file descriptor that can be read once a process has ended, None where this one cannot see it."""
    try:
        process = os.pidfd_open(pid)
    except (AttributeError, OSError):  # a Python or a kernel without it, or a filter of system calls
        return None
    if begin_of(pid) == begin:
        return process
    os.close(process)  # two machines have the same name, and this is another process
    return None
