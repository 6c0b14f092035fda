"""One update, for every method: each side's turn, and what happens when a number is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.draws import Draws
from i2i_dist.engines import SideEngine, any_not_finite
from i2i_dist.method import SIDES, Losses, Method, Side
from i2i_dist.pool import ImagePools

Sides = dict[Side, SideEngine]


class Step(NamedTuple):
    """What an update did: the mean of each loss over its micro-batches, and the sides whose step was dropped."""

    losses: Losses
    skipped: tuple[Side, ...]


def update(
    method: Method,
    sides: Sides,
    batches: Sequence[Batch | LabelledBatch],  # this rank's micro-batches of one global batch
    pools: ImagePools,
    *,
    seed: int,
    number: int,
    images_seen: int,
) -> Step:
    """Train the sides once, as `method.turns(number)` says.

    A discriminator steps at the end of its turn, the generator at the end of the update: where it comes first, the
    critics see fakes made before its step, and a number that is not finite drops both steps; where the discriminator
    comes first and meets one, the rest of the update is dropped with it.
    """
    losses: Losses = {}
    waiting: list[Side] = []  # sides whose gradients are complete
    # The generator's outputs for these batches: with their graph until its own turn, then detached.
    made: list[Any] = [None] * len(batches)
    turns = method.turns(number)
    for side in turns:
        for index, batch in enumerate(batches):
            draws = Draws(seed, batch.update_position)
            last = index + 1 == len(batches)
            if side == "generator":
                outputs = made[index] if made[index] is not None else sides["generator"](batch, draws)
                with sides["discriminator"].frozen() as judge:
                    terms = method.generator_loss(batch, outputs, judge, images_seen)
                    sides["generator"].backward(torch.stack(list(terms.values())).sum(), last=last)
                made[index] = _detached(method, outputs)
            else:
                if made[index] is None and len(batches) == 1 and "generator" in turns:
                    made[index] = sides["generator"](batch, draws)
                # Several graphs at once cost memory and confuse ZeRO 3: there the fakes are made twice.
                with torch.no_grad():
                    outputs = made[index] if made[index] is not None else sides["generator"](batch, draws, True)
                shown = pools.exchange(_detached(method, outputs), batch.positions)
                terms = method.discriminator_loss(batch, shown, sides["discriminator"], images_seen)
                sides["discriminator"].backward(torch.stack(list(terms.values())).sum(), last=last)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0.0) + term.detach() / len(batches)
        waiting.append(side)
        if side == "discriminator" and not _step(sides, waiting):
            return Step(losses, tuple(one for one in SIDES if one in turns))
    return Step(losses, () if _step(sides, waiting) else ("generator",))


def _detached(method: Method, outputs: Any) -> Any:
    return type(outputs)(**{field: getattr(outputs, field).detach() for field in (*method.fakes, *method.shown)})


def _step(sides: Sides, waiting: list[Side]) -> bool:
    """Step all sides in `waiting`, unless any rank saw a number that is not finite; say whether they were stepped."""
    if not waiting:
        return True
    bad = any_not_finite([sides[side] for side in waiting])
    for side in waiting:
        sides[side].step(skip=bad)
    waiting.clear()
    return not bad
