"""One update, for every method: each side's turn, and what happens when a number is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from i2i_dist.collapse import Listener
from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.draws import Draws
from i2i_dist.engines import SideEngine, met_not_finite
from i2i_dist.method import SIDES, Losses, Method, Side
from i2i_dist.pace import Moment, moment
from i2i_dist.pool import ImagePools

Sides = dict[Side, SideEngine]


class Step(NamedTuple):
    """What an update did."""

    losses: Losses  # mean of each over this rank's micro-batches
    skipped: tuple[Side, ...]  # whose step was dropped, on all ranks
    met: tuple[Side, ...]  # of those, in which this rank itself met a loss or gradient that is not finite
    heard: Listener  # in the generator's turn
    ready: Moment  # for the first backward: until then this rank waits for no other


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
    turns, heard, ready = method.turns(number), Listener(method.fakes), list[Moment]()

    def backward(side: Side, terms: Losses, last: bool) -> None:
        loss = torch.stack(list(terms.values())).sum()
        ready.append(moment(loss.device))
        sides[side].backward(loss, last=last)

    for side in turns:
        for index, batch in enumerate(batches):
            draws, last = Draws(seed, batch.update_position), index + 1 == len(batches)
            if side == "generator":
                outputs = made[index] if made[index] is not None else sides["generator"](batch, draws)
                made[index] = _detached(method, outputs)
                with sides["discriminator"].frozen() as judge:
                    terms = method.generator_loss(batch, outputs, heard.as_judge(judge, outputs), images_seen)
                    backward(side, terms, last)
            else:
                if made[index] is None and len(batches) == 1 and "generator" in turns:
                    made[index] = sides["generator"](batch, draws)
                # Several graphs at once cost memory and confuse ZeRO 3: there the fakes are made twice.
                with torch.no_grad():
                    outputs = made[index] if made[index] is not None else sides["generator"](batch, draws, True)
                shown = pools.exchange(_detached(method, outputs), batch.positions)
                critic = heard.as_critic(sides["discriminator"])
                terms = method.discriminator_loss(batch, shown, critic, images_seen)
                backward(side, terms, last)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0.0) + term.detach() / len(batches)
        waiting.append(side)
        if side == "discriminator" and (met := _step(sides, waiting)) is not None:
            return Step(losses, tuple(one for one in SIDES if one in turns), met, heard, ready[0])
    met = _step(sides, waiting)
    return Step(losses, () if met is None else ("generator",), met or (), heard, ready[0])


def _detached(method: Method, outputs: Any) -> Any:
    return type(outputs)(**{field: getattr(outputs, field).detach() for field in (*method.fakes, *method.shown)})


def _step(sides: Sides, waiting: list[Side]) -> tuple[Side, ...] | None:
    """Step all in `waiting` and return None; or none, if a number is not finite, and return where this rank met one."""
    if not waiting:
        return None
    met = met_not_finite([sides[side] for side in waiting])
    for side in waiting:
        sides[side].step(skip=met is not None)
    seen = None if met is None else tuple(side for side, own in zip(waiting, met, strict=True) if own)
    waiting.clear()
    return seen
