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
from collections.abc import Mapping, Sequence
from pathlib import Path

from i2i_dist.exit_codes import DONE, FAILED, MISCONFIGURED, STOPPED
from i2i_dist.processes import ancestors_up_to, descendants_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
VARIABLE = "I2I_DIST_SUPERVISOR"  # of a rank's environment: "PROCESS ID:NAME OF THE SOCKET"
RESTART = "I2I_DIST_RESTART"  # the same: the number of this restart, 0 for the first try
RESTARTS = "I2I_DIST_RESTARTS"  # the same: how many restarts there may be

_LONG_TRY = 600.0  # seconds; a try that has lasted as long begins the pauses anew
_LONGEST_PAUSE = 30.0  # seconds between two tries
_DEATH = 30.0  # seconds that a killed process may take: what waits for a dead file server does not end
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_ANSWER = 5.0  # seconds that a rank waits for a supervisor that does not read
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_LOST = "lost"  # what a rank reports, beside its exit code, when it ends because its launcher is gone
_COUNTS = (RESTART, "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of starts of the same command before
_LIMITS = (RESTARTS, "SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")


# ------------------------------------------------------------------------------------------------------ a rank's side


def supervisor() -> int | None:
    """Return the process id of the supervisor that has started this process, or None."""
    with contextlib.suppress(OSError), _to_supervisor():
        return int(os.environ[VARIABLE].partition(":")[0])
    return None


def register() -> bool:
    """Tell the supervisor, where there is one, that this process is a rank that listens to signals.

    Returns:
        False where a supervisor has started this process and cannot be told. A rank on another machine has none.
    """
    if _send("") or VARIABLE not in os.environ:
        return True
    top = int(os.environ[VARIABLE].partition(":")[0])
    return ancestors_up_to(top)[-1] != top


def report_loss() -> None:
    """Tell the supervisor, where there is one, that this rank is about to end because its launcher is gone."""
    _send(_LOST)


def report(code: int) -> None:
    """Tell the supervisor, where there is one, the code with which this rank is about to end."""
    _send(str(code))


def started_again(environment: Mapping[str, str]) -> bool:
    """Say whether the same command was started before: by a supervisor, by SLURM for the same job, or by torchrun."""
    return any(int(environment.get(name, "0")) > 0 for name in _COUNTS)


def may_start_again(environment: Mapping[str, str]) -> bool:
    """Say whether the same command is started again, or was, when it fails."""
    return any(int(environment.get(name, "0")) > 0 for name in _LIMITS)


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


def _send(text: str) -> bool:
    with contextlib.suppress(OSError), _to_supervisor() as connection:
        connection.send(text.encode())
        return True
    return False


# ------------------------------------------------------------------------------------------------ the supervisor's side


class _Reports:
    """What the ranks of a try have reported: "" while they run, their exit code in the end."""

    def __init__(self) -> None:
        self.name = f"i2i_dist_supervisor_{os.getpid()}_{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + self.name)
        self._begin()

    def _begin(self) -> None:
        self._of: dict[int, str] = {}
        self._newest: set[int] = set()
        self.launcher_lost = False  # a rank ends for that

    def read(self) -> dict[int, str]:
        """Return the last report of each process, by its id."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text, extra, *_ = self._socket.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
                pid, user, _ = _CREDENTIALS.unpack(extra[0][2])
                if user == os.getuid():
                    self._note(pid, text.decode())
        return self._of

    def _note(self, pid: int, text: str) -> None:
        if text == _LOST:
            self.launcher_lost = True
            return
        if not text:  # what has ended before this one began is of an earlier start: torchrun makes several
            self._newest = {one for one in self._newest if Path(f"/proc/{one}").exists()}
        self._newest.add(pid)
        self._of[pid] = text

    def newest(self) -> list[str]:
        """Return the last reports of the ranks that the launcher has started last."""
        return [self._of[pid] for pid in self._newest]

    def forget(self) -> None:
        """Begin a try."""
        self.read()
        self._begin()


class Supervisor:
    """Runs a command, one try after the other, and knows whether it was asked to stop."""

    def __init__(self, command: Sequence[str], grace: float) -> None:
        self._command, self._grace, self._reports = list(command), grace, _Reports()
        self._srun = Path(command[0]).name == "srun"  # its ranks descend from SLURM's daemons, and it signals them
        self._elsewhere = self._srun or _has_hostfile(command)
        self._killed = self._orphan_failed = False
        self.asked = False

    def run(self, restart: int, restarts: int) -> int:
        """Start the command, wait until every process below it has ended, and return the exit code of the try.

        Args:
            restart: The number of this restart, 0 for the first try.
            restarts: How many there may be.

        Raises:
            OSError: There is no such command.
        """
        self._reports.forget()
        told = {VARIABLE: f"{os.getpid()}:{self._reports.name}", RESTART: str(restart), RESTARTS: str(restarts)}
        leader = os.posix_spawnp(
            self._command[0], self._command, os.environ | told, setsid=True, setsigmask=[], setsigdef=STOP_SIGNALS
        )
        code: int | None = None
        deadline, self._killed, self._orphan_failed = math.inf, False, False
        while True:
            number = self.wait_for_signal(0.5)
            self._reports.read()  # or ranks have to wait
            try:
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if ended[0] == leader:
                        code = os.waitstatus_to_exitcode(ended[1])
                    else:  # its own parent is gone
                        self._orphan_failed |= ended[1] != 0
            except ChildProcessError:  # orphans are handed to this process: without children nothing is below it
                return self._verdict(code if code is not None else FAILED)
            if number is not None:
                self._pass_on(number, leader if code is None else 0)
            if code is not None or self.asked:
                deadline = min(deadline, time.monotonic() + self._grace)
            if time.monotonic() > deadline:
                self._orphan_failed |= not all(map(_is_shared_connection, descendants_of(os.getpid())))
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
            # It hands this one on. To SIGTERM it answers by killing its tasks, to SIGINT with their state.
            if leader:
                os.kill(leader, signal.SIGUSR1)
            return
        ranks = self._reports.read()
        if not ranks:
            self._kill("has no rank on this machine yet, and nothing to save here")
        family = descendants_of(os.getpid())
        for pid in (pid for pid, text in ranks.items() if not text and pid in family):
            _signal(pid, number)

    def _kill(self, reason: str) -> None:
        """Kill everything below this process."""
        said, self._killed, deadline = False, True, time.monotonic() + _DEATH
        while (family := descendants_of(os.getpid())) and time.monotonic() < deadline:
            for pid in family:
                _signal(pid, signal.SIGKILL)
            if not said:  # not before: a console that nobody reads may block
                _say(f"the command {reason}; killed its processes")
                said = True
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)
        if family:
            _say(f"processes {', '.join(map(str, sorted(family)))} do not end, though killed")

    def _verdict(self, leader: int) -> int:
        """Return the exit code of a try from the command's own, negative for a signal, and those of the ranks."""
        reports = self._reports.read()
        codes = {int(text) for text in reports.values() if text}
        if leader == DONE and self._is_done():
            return DONE
        if MISCONFIGURED in codes:
            return MISCONFIGURED
        if codes - {DONE, STOPPED}:
            return FAILED
        lost = self._reports.launcher_lost and not self.asked
        if STOPPED in codes and not lost and (self.asked or leader >= 0):  # else a launcher was lost, nobody asked
            return STOPPED
        if self.asked and (self._killed or not codes):
            return STOPPED
        if leader == DONE or (lost and leader == STOPPED):
            return FAILED
        return leader if leader >= 0 else 128 - leader

    def _is_done(self) -> bool:
        """Say whether to believe a command that ends with 0: deepspeed's does so when its own child was killed."""
        if texts := self._reports.newest():
            return set(texts) == {str(DONE)}
        # Ranks on other machines cannot report. When pdsh is killed, its connections outlive it, and end with an error.
        return self._elsewhere and not (self.asked or self._orphan_failed)


def _has_hostfile(command: Sequence[str]) -> bool:
    """Say whether a command of deepspeed starts its ranks by ssh, which hands on neither reports nor variables."""
    words = " ".join(command).split()  # also those of a shell's script
    return "--no_ssh" not in words and any(word.startswith(("--hostfile", "-H")) for word in words)


def _is_shared_connection(pid: int) -> bool:
    """Say whether a process is what ssh leaves behind for later connections where ControlPersist is set."""
    try:
        return b"[mux]" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return True


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the console may be gone
        print(f"supervise.py: {text}.", file=sys.stderr, flush=True)


def _supervise(supervisor: Supervisor, restarts: int) -> int:
    short_tries = 0
    for number in range(restarts + 1):
        begun = time.monotonic()
        code = supervisor.run(number, restarts)
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
    going_back = [word for word in command if word == "--fresh" or word.split("=")[0] == "--resume"]
    if options.restarts and going_back and _has_hostfile(command):
        parser.error(
            f"{going_back[0]} with --hostfile: each restart would go back again, for ssh does not tell the ranks that "
            f"they were started before; leave out --restarts, or {going_back[0]} once the run has a checkpoint"
        )
    if not 0 <= options.grace < math.inf:
        parser.error(f"--grace: given {options.grace:g}, allowed is 0 or more seconds")
    return options, command


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise a command; return its exit code, or 75 when it was stopped by a signal and can be resumed."""
    options, command = _parse(sys.argv[1:] if arguments is None else arguments)
    # Signals wait until they are asked for, so that none is lost between two of them or between two tries.
    signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, signal.SIGCHLD])
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run nobody watches outlives the terminal it was started from
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this system does not hand orphans to the process that supervises them")
    try:
        return _supervise(Supervisor(command, options.grace), options.restarts)
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"{command[0]}: {error.strerror}")
        return MISCONFIGURED
