"""What the tests of StarGAN and MatchGAN share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from i2i_dist.data.batch import LabelledBatch
from i2i_dist.draws import Draws
from i2i_dist.schedules import LinearDecay
from tests.methods import plain_networks
from tests.methods.plain_side import plain_sides

SEED, FIRST, SIZE = 3, 64, 16
DRAWS = Draws(SEED, FIRST)
TINY = {"image_size": SIZE, "width": 2, "blocks": 1, "critic_width": 2, "critic_layers": 3}
EMOTIONS = ["angry", "happy", "neutral", "sad"]
SPACES: dict[str, dict[str, Any]] = {
    "attributes": {},
    "choice": {"attributes": EMOTIONS, "at_most_one": [], "exactly_one": [EMOTIONS]},
    "both": {"attributes": ["Male", *EMOTIONS, "Young"], "at_most_one": [], "exactly_one": [EMOTIONS]},
}


def build(name: str, **changes: Any) -> Any:
    """A small method in fp64, with scales and shifts of the norms that are not 1 and 0."""
    return plain_networks.build({"name": name, **TINY, **changes}, scale=2.0)


def batch(method: Any, images: int, told: bool = True) -> LabelledBatch:
    """Pictures, in groups of a class where the method has them, and others' labels; fp64."""
    draw = torch.Generator().manual_seed(5)
    pictures = torch.rand(images, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1
    classes = torch.from_numpy(method.label_space.classes).double()
    each = method.labelled_group[1] if method.labelled_group else 1
    labels = classes[torch.arange(images) // each * 3 % len(classes)]
    others = classes[torch.randint(len(classes), (images,), generator=draw)]
    positions = torch.arange(images) + FIRST
    return LabelledBatch(pictures, labels if told else None, others if told else None, positions, FIRST)


def part(given: LabelledBatch, rows: slice) -> LabelledBatch:
    return LabelledBatch(*(x[rows] if isinstance(x, Tensor) else x for x in given))


def detached(outputs: Any) -> Any:
    """What the critic's turn gets to see."""
    return type(outputs)(outputs.fake.detach(), outputs.mixed)


def released_rates(updates: range, lr: float, decay_from: int = 100_000, decay: int = 100_000) -> dict[int, float]:
    """The rates of the authors' loop, where the last lines of each update lower them every 1,000 updates."""
    rate, rates = lr, {}
    for i in range(updates.stop):
        if i in updates:
            rates[i] = rate
        if (i + 1) % 1000 == 0 and (i + 1) > decay_from:
            rate -= lr / decay
    return rates


def our_rates(method: Any, schedule: LinearDecay, updates: range, batch_size: int) -> dict[int, float]:
    sides, rates = plain_sides(method), {}
    for i in updates:
        for side in sides.values():
            side.set_learning_rate(schedule.factor(i * batch_size))
        (rates[i],) = {group["lr"] for side in sides.values() for group in side.optimizer.param_groups}
    return rates
