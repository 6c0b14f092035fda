"""Who asks a run to stop: people and schedulers by signals, and the loss of the launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from i2i_dist import supervise
from i2i_dist.exit_codes import STOPPED
from i2i_dist.processes import ancestors_up_to, parent_of
from i2i_dist.supervise import STOP_SIGNALS

_LOOK_EVERY = 1.0  # seconds
_log = logging.getLogger("i2i_dist.stopping")


class StopRequest:
    """Whether somebody asked the run to stop: signals, and the loss of what has started it, only set a flag."""

    def __init__(self, launchers: tuple[int, ...]) -> None:
        """Listen to signals, and watch the launcher.

        Args:
            launchers: What `launchers` has returned when the process began.
        """
        self.together = False  # whether the ranks have met, so that there is a run to be saved
        self.asked = False  # of this rank alone
        self.launcher_lost = False  # and nobody had asked before; the loop makes it that of any rank
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # Not before, or a signal handed on ended the process.
        self.registered = supervise.register()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True).start()

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def _watch(self, launchers: tuple[int, ...]) -> None:
        """Ask to stop when one of the `launchers` is gone, or the connection to another machine is."""
        by_ssh = int(os.environ.get("CROSS_SIZE", "1")) > 1  # nodes of the deepspeed command
        while ancestors_up_to(launchers[-1]) == launchers and not (by_ssh and nobody_reads(1)):
            time.sleep(_LOOK_EVERY)
        self.launcher_lost = not self.asked
        self.asked = True
        if self.together:
            _log.warning("The launcher that started this rank is gone: the run saves and ends.")
            return
        # Where the launcher was to bring the ranks together they would wait for that until the timeout.
        with contextlib.suppress(OSError):  # the console may be gone, too
            print("train.py: the launcher that started this rank is gone, before it could train.", file=sys.stderr)
        os._exit(STOPPED)


def launchers() -> tuple[int, ...]:
    """Return this process's parent, its parent and so on up to the supervisor or the launcher; nothing without either.

    To be asked first of all: torch takes seconds to load, and whatever is gone by then is missing in what is returned.
    """
    return ancestors_up_to(supervise.supervisor() or _launcher()) if has_launcher(os.environ) else ()


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Say whether a launcher has started this process, so that it must not outlive it, as it may outlive a shell."""
    variables = ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS")  # of deepspeed, torchrun and srun
    return supervise.supervisor() is not None or any(name in environment for name in variables)


def _launcher() -> int:
    """Return the process id of the launcher: the parent, or with deepspeed the command that has started the parent."""
    parent = os.getppid()
    return parent_of(parent) if "CROSS_RANK" in os.environ else parent


def nobody_reads(file: int) -> bool:
    """Say whether a file descriptor is a pipe or socket without a reader.

    Of a process that ssh has started, standard output is one when the connection has been closed: it gets no signal.
    """
    mode = os.fstat(file).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return False
    poll = select.poll()
    poll.register(file, 0)  # errors and hang-ups are always told
    return bool(poll.poll(0))
