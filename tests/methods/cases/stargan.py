"""StarGAN: a tiny version, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch

from i2i_dist.data.batch import LabelledBatch
from i2i_dist.draws import Draws
from tests.methods import plain_stargan as plain
from tests.methods.cases.common import SEED

# Of four updates the third has a turn of the generator.
SMALL: dict[str, Any] = {
    "image_size": 32, "width": 4, "blocks": 1, "critic_width": 4, "critic_layers": 4, "critic_turns": 3, "lr": 0.01,
}  # fmt: skip


def step(method: Any, batch: LabelledBatch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The authors' code's step: fakes made anew for the generator's turn, and all gradients set to zero before each."""
    g, d = method.generator.generator, method.discriminator.critic
    assert batch.labels is not None and batch.others is not None
    x, labels, target = batch.images, batch.labels, batch.others
    alpha = Draws(SEED, batch.update_position).uniform("mixed", batch.positions)

    def stepped(side: str, loss: torch.Tensor) -> None:
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizers[side].step()

    fake = plain.generator(g, x, target).detach()
    loss = -plain.realness(d, x).mean() + plain.realness(d, fake).mean()
    loss = loss + plain.of_attributes(d, x, labels) + 10 * plain.penalty(d, x, fake, alpha)
    stepped("discriminator", loss)
    if (number + 1) % method.config.critic_turns == 0:
        fake = plain.generator(g, x, target)
        loss = -plain.realness(d, fake).mean() + plain.of_attributes(d, fake, target)
        loss = loss + 10 * (x - plain.generator(g, fake, labels)).abs().mean()
        stepped("generator", loss)
