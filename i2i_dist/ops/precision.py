"""Where arithmetic has to be as exact as its operands."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return the context in which autocast changes nothing on the device of `x`; the meta device knows none."""
    if x.is_meta:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(x.device.type, enabled=False)
    return context
