"""The numbers of one stretch of training, as every part of telemetry receives them."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

# Why a checkpoint could not be written, as the system names it; "other" is all else.
CHECKPOINT_FAILURES = ("edquot", "efbig", "eio", "enospc", "erofs", "other")


class UpdateRecord(NamedTuple):
    """Statistics of the updates between two log points.

    Attributes:
        images_seen: Images of the real data shown so far, over all ranks and since the run's first start.
        target_images: Images at which the run ends.
        update: Updates made so far, since the run's first start.
        losses: Mean of each weighted loss over the updates that computed it; may be NaN or infinite.
        learning_rates: Learning rate of each parameter group at the last update.
        gauges: What is watched beside the losses (see `method.Gauge`), by name.
        images_per_second: Images per second of update time, over all ranks.
        seconds_per_update: Mean duration of an update.
        data_wait_share: Part of the update time spent waiting for data, in [0, 1].
        data_wait_seconds: The same in seconds, summed over the updates.
        update_seconds: Duration of each update, in order.
        memory_bytes: See `memory_bytes`.
        eta_seconds: Expected time to the end of the run; infinite while no image has been seen.
        slowest_rank: The rank that works slowest by itself (see `i2i_dist.pace`).
        slowest_rank_score: Its score: 1 is as fast as the others, and what a run of one rank has.
    """

    images_seen: int
    target_images: int
    update: int
    losses: dict[str, float]
    learning_rates: dict[str, float]
    gauges: dict[str, float]
    images_per_second: float
    seconds_per_update: float
    data_wait_share: float
    data_wait_seconds: float
    update_seconds: tuple[float, ...]
    memory_bytes: int
    eta_seconds: float
    slowest_rank: int = 0
    slowest_rank_score: float = 1.0


def memory_kind() -> str:
    """Say what `memory_bytes` measures in this process: "cuda_peak" or "resident"."""
    return "cuda_peak" if torch.cuda.is_initialized() else "resident"


def memory_bytes() -> int:
    """Return the peak of memory allocated on the current CUDA device, or the resident set size where CUDA is unused.

    Both are of this process alone. Without /proc the resident set is the largest so far, the only one macOS tells.
    """
    if memory_kind() == "cuda_peak":
        return int(torch.cuda.max_memory_allocated())
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
