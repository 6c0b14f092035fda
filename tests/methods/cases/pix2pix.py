"""pix2pix: a tiny version, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from tests.networks import plain

# With 5 halvings, all that the size of these tests allows, there is no place for dropout.
SMALL: dict[str, Any] = {"width": 4, "downs": 5, "critic_width": 4, "lr": 0.001}


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The authors' code's step: critic first, translations and true pictures in passes of their own."""
    a, b = batch.a, batch.b
    g, d = method.generator.generator_ab, method.discriminator.critic_b
    fake = plain.unet(g, a)

    def bce(logits: Tensor, target: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    loss = 0.5 * (bce(plain.critic(d, a, fake.detach()), 0.0) + bce(plain.critic(d, a, b), 1.0))
    optimizers["discriminator"].zero_grad()
    loss.backward()
    optimizers["discriminator"].step()
    d.requires_grad_(False)
    loss = bce(plain.critic(d, a, fake), 1.0) + 100 * F.l1_loss(fake, b)
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()
    d.requires_grad_(True)
