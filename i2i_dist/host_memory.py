"""How the C library deals with memory that is freed, which on a CPU is part of a training step's time."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Have glibc hand the blocks that one step frees to the next instead of to the system.

    By default every large tensor is mapped anew and its pages are faulted in, in each step, which shows from 256 x 256
    on. Other C libraries have no such setting.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
