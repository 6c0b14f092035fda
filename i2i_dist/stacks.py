"""Where a rank was when it hung, failed or crashed: the stacks of all its threads, in its own log.

faulthandler writes them from C: while the main thread waits in a collective, and when the process is ended by a fatal
signal, such as the SIGABRT with which NCCL's watchdog ends a rank. Its state belongs to the process, and so does this
module's.
"""

from __future__ import annotations

import faulthandler
import time
import traceback
from pathlib import Path
from typing import TextIO

_log: TextIO | None = None
_patience = 0.0  # seconds


def write_to(path: Path, patience: float) -> None:
    """From now on write stacks to the end of a file: at a crash, and after `patience` seconds without `alive`."""
    global _log, _patience
    _log, _patience = path.open("a", encoding="utf-8"), patience
    faulthandler.enable(_log)
    alive()


def alive() -> None:
    """Say that the rank gets on: the time until its stacks are written begins anew. Cheap enough for every update."""
    if _log is not None:
        faulthandler.dump_traceback_later(_patience, file=_log)


def leaving() -> None:
    """Say that the rank ends: what follows may take its time."""
    faulthandler.cancel_dump_traceback_later()


def write(error: BaseException | None, sentence: str) -> bool:
    """Write what ends this rank: a sentence, the traceback of an error, all threads; return False without a log."""
    if _log is None:
        return False
    try:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {sentence}", file=_log)
        if error is not None:
            traceback.print_exception(error, file=_log)
        print("All threads:", file=_log, flush=True)
        faulthandler.dump_traceback(_log, all_threads=True)
    except OSError:  # a full disk must not hide the sentence on the console
        return False
    return True
