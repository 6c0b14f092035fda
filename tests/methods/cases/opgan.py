"""OP-GAN: a tiny version, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from tests.methods import plain_siamese
from tests.methods.cases.common import GLOBAL_BATCH, SEED

SMALL: dict[str, Any] = {
    "width": 4, "blocks": 1, "critic_width": 4, "siamese_width": 4, "pool_size": 0, "lr": 0.001,
}  # fmt: skip


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """What the paper's summary says: generators with all else fixed, then critics and siamese network."""
    a, b = batch.a, batch.b
    g, d = method.generator, method.discriminator
    ab, ba = (lambda x: g.generator_ab(x)[0]), (lambda x: g.generator_ba(x)[0])
    fake_b, fake_a = ab(a), ba(b)
    draws, first = Draws(SEED, number * GLOBAL_BATCH), number * GLOBAL_BATCH
    positions = torch.arange(first, first + GLOBAL_BATCH)
    cells = {way: plain_siamese.cells_of(draws, way, positions, 1) for way in ("ab", "ba")}

    d.requires_grad_(False)
    content_ab, domain_ab, _ = plain_siamese.terms(d.siamese, a, fake_b, cells["ab"], 0)
    content_ba, domain_ba, _ = plain_siamese.terms(d.siamese, b, fake_a, cells["ba"], 1)
    loss = (
        (d.critic_b(fake_b) - 1).pow(2).mean()
        + (d.critic_a(fake_a) - 1).pow(2).mean()
        + 10 * F.l1_loss(ba(fake_b), a)
        + 10 * F.l1_loss(ab(fake_a), b)
        + content_ab + domain_ab + content_ba + domain_ba
    )  # fmt: skip
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()

    d.requires_grad_(True)
    fake_a, fake_b = fake_a.detach(), fake_b.detach()
    loss = sum(
        0.5 * ((critic(real) - 1).pow(2).mean() + critic(fake).pow(2).mean())
        for critic, real, fake in ((d.critic_a, a, fake_a), (d.critic_b, b, fake_b))
    )
    for source, fake, way in ((a, fake_b, "ab"), (b, fake_a, "ba")):
        content, domain, short = plain_siamese.terms(d.siamese, source, fake, cells[way], "ab".index(way[0]))
        loss = loss + content + domain + 0.5 * short  # of the spread it is the mean over all pictures
    optimizers["discriminator"].zero_grad()
    loss.backward()
    optimizers["discriminator"].step()
