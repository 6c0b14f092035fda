"""The exponential moving average of the generators, which is what samples and translations are made with.

Averaging is element by element, so each rank averages only the elements that it writes into checkpoints: the average
costs no communication and no more memory in all than one copy of the weights, at every ZeRO stage. It lies where the
optimizer's state does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from i2i_dist.distributed import rank_and_world
from i2i_dist.engine_state import Slot, Source, slots
from i2i_dist.engines import SideEngine
from i2i_dist.schedules import ema_decay


class Ema:
    """The average of one side's parameters; with a half-life of 0 it is the parameters, and costs nothing."""

    def __init__(self, side: SideEngine, half_life_images: int) -> None:
        self.half_life_images, self._side = half_life_images, side
        self._slots: list[Slot] = slots(side)
        self.averages: dict[str, Tensor] = {}
        if half_life_images:
            self.averages = {slot.name: slot.owned(slot.flat).clone() for slot in self._slots}

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Move the average towards the weights, after an update of `batch` images."""
        if self.averages:
            weights = [slot.owned(slot.flat) for slot in self._slots]
            decay = ema_decay(images_seen, batch, self.half_life_images)
            torch._foreach_lerp_([self.averages[slot.name] for slot in self._slots], weights, 1.0 - decay)

    def restore(self, source: Source) -> None:
        """Take the average from a checkpoint, or the weights where the checkpoint has none."""
        shapes = source.shapes()
        for slot in self._slots if self.averages else ():
            kind = "ema" if f"ema/{slot.name}" in shapes else "param"
            self.averages[slot.name].copy_(source.read(f"{kind}/{slot.name}", slot.own_start, slot.own_length))

    @torch.no_grad()
    def load_into(self, replica: nn.Module | None) -> None:
        """Fill rank 0's `replica`, a plain copy of the side's module, with the average. Collective; None elsewhere."""
        parameters = dict(replica.named_parameters()) if replica is not None else {}
        for slot in self._slots:
            mine = self.averages[slot.name] if self.averages else slot.owned(slot.flat)
            whole = torch.zeros(math.prod(slot.shape), device=self._side.device)
            whole.narrow(0, slot.own_start, slot.own_length).copy_(mine)
            if rank_and_world()[1] > 1:
                torch.distributed.reduce(whole, dst=0)
            if replica is not None:
                parameters[slot.name].copy_(whole.view(slot.shape))
