"""CycleGAN: a tiny version, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from i2i_dist.data.batch import Batch

SMALL: dict[str, Any] = {"width": 4, "blocks": 1, "critic_width": 4, "pool_size": 0, "lr": 0.001}


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The authors' code's step: generators first, the critics see the fakes made before."""
    a, b = batch.a, batch.b
    g, d = method.generator, method.discriminator
    ab, ba = (lambda x: g.generator_ab(x)[0]), (lambda x: g.generator_ba(x)[0])
    fake_b, fake_a = ab(a), ba(b)
    d.requires_grad_(False)
    loss = (
        F.mse_loss(d.critic_b(fake_b), torch.ones(()).expand_as(d.critic_b(fake_b)).double())
        + F.mse_loss(d.critic_a(fake_a), torch.ones(()).expand_as(d.critic_a(fake_a)).double())
        + 10 * F.l1_loss(ba(fake_b), a)
        + 10 * F.l1_loss(ab(fake_a), b)
        + 5 * F.l1_loss(ab(b), b)
        + 5 * F.l1_loss(ba(a), a)
    )
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()
    d.requires_grad_(True)
    loss = sum(
        0.5 * ((critic(real) - 1).pow(2).mean() + critic(fake.detach()).pow(2).mean())
        for critic, real, fake in ((d.critic_a, a, fake_a), (d.critic_b, b, fake_b))
    )
    optimizers["discriminator"].zero_grad()
    loss.backward()
    optimizers["discriminator"].step()
