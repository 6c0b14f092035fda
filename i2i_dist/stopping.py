"""How a run ends: the exit codes, and who asks it to stop."""

from __future__ import annotations

import signal
from typing import Any

import torch

from i2i_dist.distributed import any_rank

DONE, FAILED, MISCONFIGURED, STOPPED = 0, 1, 2, 75  # exit codes; 75: stopped early, and can be resumed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked the run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set a flag."""

    def __init__(self) -> None:
        self._asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_any_rank(self, device: torch.device) -> bool:
        """Say whether any rank was asked; all ranks get the same answer. Collective."""
        return any_rank(torch.tensor([float(self._asked)], device=device))[0]
