"""MatchGAN: a tiny version whose groups are 2 x 2 pictures, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch

from i2i_dist.data.batch import LabelledBatch
from i2i_dist.draws import Draws
from tests.methods import plain_stargan as plain
from tests.methods.cases.common import SEED

# Every update has a turn of the generator, so that it meets pictures with and without labels.
SMALL: dict[str, Any] = {
    "image_size": 32, "width": 4, "blocks": 1, "critic_width": 4, "critic_layers": 4, "critic_turns": 1, "lr": 0.01,
    "labelled_fraction": 0.5, "group_classes": 2, "group_images": 2,
}  # fmt: skip
BATCH = 8  # two ranks have a group each


def step(method: Any, batch: LabelledBatch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The authors' code's step; a head that an update has no term for gets a gradient of zeros."""
    g, d, config = method.generator.generator, method.discriminator.critic, method.config
    shape = config.group_classes, config.group_images
    x, labels, draws = batch.images, batch.labels, Draws(SEED, batch.update_position)
    alpha = draws.uniform("mixed", batch.positions)
    table = torch.tensor(method.label_space.classes.tolist(), dtype=x.dtype)
    drawn = draws.distinct("target", batch.positions[:: shape[0] * shape[1]], len(table), shape[0])
    target = torch.cat([table[row] for row in drawn for _ in range(shape[1])])

    def compared(groups: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([plain.comparison(d, group) for group in groups]).mean()

    def stepped(side: str, loss: torch.Tensor) -> None:
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizers[side].step()

    fake = plain.generator(g, x, target).detach()
    loss = -plain.realness(d, x).mean() + plain.realness(d, fake).mean() + 10 * plain.penalty(d, x, fake, alpha)
    if labels is not None:
        loss = loss + plain.of_attributes(d, x, labels) + 0.5 * compared(plain.by_label(x, *shape))
    stepped("discriminator", loss)
    if (number + 1) % config.critic_turns == 0:
        fake = plain.generator(g, x, target)
        loss = -plain.realness(d, fake).mean() + plain.of_attributes(d, fake, target)
        loss = loss + 0.5 * compared(plain.by_target(fake, *shape))
        if labels is not None:
            loss = loss + 10 * (x - plain.generator(g, fake, labels)).abs().mean()
        stepped("generator", loss)
