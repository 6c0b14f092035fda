"""DCLGAN: a tiny version, and its update as a plain loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.networks.projection import take
from tests.methods.cases.common import GLOBAL_BATCH, SEED, plain_nce

SMALL: dict[str, Any] = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 32, "nce_patches": 16,
    "nce_layers": ["down1", "down2", "block2"], "lr": 0.01, "lr_heads": 0.02,
}  # fmt: skip


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The released code's step: every pass on its own, discriminators first."""
    a, b = batch.a, batch.b
    g, d, layers = method.generator, method.discriminator, method.config.nce_layers
    fake_b, fake_a = g.generator_ab(a)[0], g.generator_ba(b)[0]
    identity_b, identity_a = g.generator_ab(b)[0], g.generator_ba(a)[0]
    loss = sum(
        0.5 * (F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean())
        for critic, real, fake in ((d.critic_a, a, fake_a), (d.critic_b, b, fake_b))
    )
    optimizers["discriminator"].zero_grad()
    loss.backward()
    optimizers["discriminator"].step()

    d.requires_grad_(False)
    draws = Draws(SEED, number * GLOBAL_BATCH)

    def nce(direction: str, source: Tensor, fake: Tensor, encoder: Any, fake_encoder: Any, heads: Any) -> Tensor:
        keys, queries = encoder(source, layers, encode_only=True)[1], fake_encoder(fake, layers, encode_only=True)[1]
        ids = [
            draws.patch_ids(f"{direction}.{layer}", math.prod(key.shape[2:]), method.config.nce_patches)
            for layer, key in zip(layers, keys, strict=True)
        ]
        head_key, head_query = heads
        return plain_nce(
            list(head_query([take(query, i) for query, i in zip(queries, ids, strict=True)])),
            list(head_key([take(key, i) for key, i in zip(keys, ids, strict=True)])),
        )

    loss = (
        0.5 * (F.relu(1 - d.critic_b(fake_b)).mean() + F.relu(1 - d.critic_a(fake_a)).mean())
        + 0.5 * 2.0 * nce("ab", a, fake_b, g.generator_ab, g.generator_ba, (g.head_a, g.head_b))
        + 0.5 * 2.0 * nce("ba", b, fake_a, g.generator_ba, g.generator_ab, (g.head_b, g.head_a))
        + 0.5 * (F.l1_loss(identity_a, a) + F.l1_loss(identity_b, b))
    )
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()
    d.requires_grad_(True)
