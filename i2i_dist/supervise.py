"""Start a launcher, hand signals on to its ranks, start it again when it fails, and leave no process behind.

`deepspeed` and `torchrun` kill the ranks by their own clocks when they are signalled, or leave them as orphans. So the
supervisor never signals them: each rank reports to it once it listens to signals, and the supervisor signals those of
them that descend from itself. When a rank ends in order it reports its exit code as well, for `torchrun` turns every
code into 1. Reports come through a socket that has a name and no file, which no cleaning of old files takes away from
a run of weeks, and of each the kernel says which process has sent it.

Nothing here imports torch: a supervisor lives beside every run. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import secrets
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from i2i_dist.exit_codes import DONE, FAILED, MISCONFIGURED, STOPPED
from i2i_dist.processes import descendants_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
VARIABLE = "I2I_DIST_SUPERVISOR"  # of a rank's environment: "PROCESS ID:NAME OF THE SOCKET"

_LONG_TRY = 600.0  # seconds; a try that has lasted as long begins the pauses anew
_LONGEST_PAUSE = 30.0  # seconds between two tries
_DEATH = 30.0  # seconds that a killed process may take: what waits for a dead file server does not end
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_ANSWER = 5.0  # seconds that a rank waits for a supervisor that does not read
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


# ------------------------------------------------------------------------------------------------------ a rank's side


def supervisor() -> int | None:
    """Return the process id of the supervisor that has started this process, or None."""
    with contextlib.suppress(OSError), _to_supervisor():
        return int(os.environ[VARIABLE].partition(":")[0])
    return None


def register() -> None:
    """Tell the supervisor, where there is one, that this process is a rank that listens to signals."""
    _send("")


def report(code: int) -> None:
    """Tell the supervisor, where there is one, the code with which this rank is about to end."""
    _send(str(code))


def _to_supervisor() -> socket.socket:
    """Open a connection; `OSError` where there is no supervisor: a rank on another machine inherits the variable."""
    if VARIABLE not in os.environ:
        raise ConnectionRefusedError
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    connection.settimeout(_ANSWER)
    try:
        connection.connect("\0" + os.environ[VARIABLE].partition(":")[2])
    except OSError:
        connection.close()
        raise
    return connection


def _send(text: str) -> None:
    with contextlib.suppress(OSError), _to_supervisor() as connection:
        connection.send(text.encode())


# ------------------------------------------------------------------------------------------------ the supervisor's side


class _Reports:
    """What the ranks of a try have reported: "" while they run, their exit code in the end."""

    def __init__(self) -> None:
        self.name = f"i2i_dist_supervisor_{os.getpid()}_{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + self.name)
        self._of: dict[int, str] = {}

    def read(self) -> dict[int, str]:
        """Return the last report of each process, by its id."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text, extra, *_ = self._socket.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
                pid, user, _ = _CREDENTIALS.unpack(extra[0][2])
                if user == os.getuid():
                    self._of[pid] = text.decode()
        return self._of

    def forget(self) -> None:
        """Begin a try."""
        self.read()
        self._of = {}


class Supervisor:
    """Runs a command, one try after the other, and knows whether it was asked to stop."""

    def __init__(self, command: Sequence[str], grace: float) -> None:
        self._command, self._grace, self._reports = list(command), grace, _Reports()
        self._srun = Path(command[0]).name == "srun"  # its ranks descend from SLURM's daemons, and it signals them
        self._killed = False
        self.asked = False

    def run(self) -> int:
        """Start the command, wait until every process below it has ended, and return the exit code of the try.

        Raises:
            OSError: There is no such command.
        """
        self._reports.forget()
        environment = os.environ | {VARIABLE: f"{os.getpid()}:{self._reports.name}"}
        leader = os.posix_spawnp(
            self._command[0], self._command, environment, setsid=True, setsigmask=[], setsigdef=STOP_SIGNALS
        )
        code: int | None = None
        deadline, self._killed = math.inf, False
        while True:
            number = self.wait_for_signal(0.5)
            self._reports.read()  # or ranks have to wait
            try:
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if ended[0] == leader:
                        code = os.waitstatus_to_exitcode(ended[1])
            except ChildProcessError:  # orphans are handed to this process: without children nothing is below it
                return self._verdict(code if code is not None else FAILED)
            if number is not None:
                self._pass_on(number, leader if code is None else 0)
            if code is not None or self.asked:
                deadline = min(deadline, time.monotonic() + self._grace)
            if time.monotonic() > deadline:
                self._kill(f"did not end within the grace of {self._grace:g} s")
                return self._verdict(code if code is not None else -signal.SIGKILL)

    def wait_for_signal(self, seconds: float) -> int | None:
        """Wait for a signal that asks to stop and return it; None when a process ends or the time is over."""
        found = signal.sigtimedwait([*STOP_SIGNALS, signal.SIGCHLD], seconds)
        if found is None or found.si_signo == signal.SIGCHLD:
            return None
        self.asked = True
        return found.si_signo

    def _pass_on(self, number: int, leader: int) -> None:
        if self._srun:
            if leader:  # to the first SIGINT srun only answers with the state of its tasks
                os.kill(leader, signal.SIGTERM if number == signal.SIGINT else number)
            return
        ranks = self._reports.read()
        if not ranks:
            self._kill("has no rank on this machine yet, and nothing to save here")
        family = descendants_of(os.getpid())
        for pid in (pid for pid, text in ranks.items() if not text and pid in family):
            _signal(pid, number)

    def _kill(self, reason: str) -> None:
        """Kill everything below this process."""
        _say(f"the command {reason}; killing its processes")
        self._killed, deadline = True, time.monotonic() + _DEATH
        while (family := descendants_of(os.getpid())) and time.monotonic() < deadline:
            for pid in family:
                _signal(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)
        if family:
            _say(f"processes {', '.join(map(str, sorted(family)))} do not end, though killed")

    def _verdict(self, leader: int) -> int:
        """Return the exit code of a try from the command's own, negative for a signal, and those of the ranks."""
        texts = list(self._reports.read().values())
        codes = {int(text) for text in texts if text}
        if MISCONFIGURED in codes:
            return MISCONFIGURED
        if codes - {DONE, STOPPED}:
            return FAILED
        if STOPPED in codes and (self.asked or leader >= 0):  # else the command was lost, and the ranks noticed
            return STOPPED
        if self.asked and (self._killed or not texts):
            return STOPPED
        if leader == DONE and not all(texts):  # the deepspeed command answers 0 when its own child was killed
            return FAILED
        return leader if leader >= 0 else 128 - leader


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def _say(text: str) -> None:
    print(f"supervise.py: {text}.", file=sys.stderr, flush=True)


def _supervise(supervisor: Supervisor, restarts: int) -> int:
    short_tries = 0
    for number in range(restarts + 1):
        begun = time.monotonic()
        code = supervisor.run()
        if supervisor.asked or code in (DONE, MISCONFIGURED, STOPPED):
            return code
        if number == restarts:
            break
        short_tries = 1 if time.monotonic() - begun > _LONG_TRY else short_tries + 1
        pause = min(_LONGEST_PAUSE, 2.0 ** (short_tries - 1))
        _say(f"the command ended with exit code {code}; restart {number + 1} of {restarts} in {pause:g} s")
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0:
            if supervisor.wait_for_signal(left) is not None:
                return STOPPED
    _say(f"the command ended with exit code {code}" + (", and no restart is left" if restarts else ""))
    return code


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="supervise.py",
        usage="supervise.py [--restarts N] [--grace SECONDS] -- COMMAND...",
        description="Start a command that starts train.py, hand signals on to its ranks, start it again if it fails.",
        allow_abbrev=False,
    )
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="start again up to N times (default: 0)")
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="what saving may take after a signal (default: 120)",
    )
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    (options, unknown), command = parser.parse_known_args(arguments[:cut]), list(arguments[cut + 1 :])
    if unknown:
        parser.error(f"{unknown[0]} is not an option here; the command stands behind --")
    if not command:
        parser.error("no command; write it behind --, as in: supervise.py --restarts 3 -- deepspeed launchers/train.py")
    if options.restarts < 0:
        parser.error(f"--restarts: given {options.restarts}, allowed is 0 or more")
    if not 0 <= options.grace < math.inf:
        parser.error(f"--grace: given {options.grace:g}, allowed is 0 or more seconds")
    return options, command


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise a command; return its exit code, or 75 when it was stopped by a signal and can be resumed."""
    options, command = _parse(sys.argv[1:] if arguments is None else arguments)
    # Signals wait until they are asked for, so that none is lost between two of them or between two tries.
    signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, signal.SIGCHLD])
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this system does not hand orphans to the process that supervises them")
    try:
        return _supervise(Supervisor(command, options.grace), options.restarts)
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"{command[0]}: {error.strerror}")
        return MISCONFIGURED
