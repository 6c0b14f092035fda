"""How a run ends: the exit codes, and who asks it to stop."""

from __future__ import annotations

import signal
from typing import Any

DONE, FAILED, MISCONFIGURED, STOPPED = 0, 1, 2, 75  # exit codes; 75: stopped early, and can be resumed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked the run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set a flag."""

    def __init__(self) -> None:
        self.asked = False  # of this rank alone
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
