"""Which process started which and when, read from Linux's /proc."""

from __future__ import annotations

import os
from pathlib import Path


def parent_of(pid: int) -> int:
    """Return the id of the process that a process belongs to; 0 where there is none."""
    return _number(pid, 4)


def begin_of(pid: int) -> int:
    """Return when a process was started, in ticks since the machine was; 0 where there is none."""
    return _number(pid, 22)


def _number(pid: int, field: int) -> int:
    """Return a number of /proc/PID/stat, counted from 1 as in proc(5); 0 where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return 0
    return int(text.rpartition(")")[2].split()[field - 3])  # the name, field 2, may hold anything, brackets too


def descendants_of(pid: int) -> set[int]:
    """Return the ids of all processes below a process."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            children.setdefault(parent_of(int(name)), []).append(int(name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def ancestors_up_to(top: int) -> tuple[int, ...]:
    """Return this process's parent, its parent, and so on up to `top`; the parent alone where `top` is none of them."""
    parent = os.getppid()
    chain = [parent]
    while chain[-1] not in (top, 0):
        chain.append(parent_of(chain[-1]))
    return tuple(chain) if chain[-1] == top else (parent,)
