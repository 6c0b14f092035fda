"""CUT: a tiny version with FastCUT's flip besides, and its update as a plain loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from tests.methods.cases.common import GLOBAL_BATCH, SEED

SMALL: dict[str, Any] = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 32, "nce_patches": 16,
    "nce_layers": ["rgb", "down1", "block2"], "flip_equivariance": True, "lr": 0.01,
}  # fmt: skip


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.to(x.dtype).T + layer.bias.to(x.dtype)


def rows(head: Any, features: Tensor, ids: Tensor) -> Tensor:
    """[N, P, D] of length nearly 1: the norm has 1e-7 added."""
    x = linear(head[2], linear(head[0], features.flatten(2)[:, :, ids].mT).relu())
    return x / (x.square().sum(2, keepdim=True).sqrt() + 1e-7)


def nce(query: Tensor, key: Tensor) -> Tensor:
    """Image by image, the positive twice: in front, and at its own place as -10 before the temperature divides."""
    losses = []
    for q, k in zip(query, key.detach(), strict=True):
        similar = torch.einsum("id,jd->ij", q, k)
        logits = torch.cat([similar.diagonal()[:, None], similar.clone().fill_diagonal_(-10.0)], dim=1) / 0.07
        losses.append(F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none"))
    return torch.cat(losses).mean()


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The released code's step: the discriminator first, source and target encoded apart for each PatchNCE term."""
    a, b = batch.a, batch.b
    g, d, config = method.generator, method.discriminator, method.config
    draws = Draws(SEED, number * GLOBAL_BATCH)
    flipped = config.flip_equivariance and draws.coin("flip")

    def turned(x: Tensor) -> Tensor:
        return x.flip(3) if flipped else x

    fake_b, identity_b = g.generator_ab(turned(a))[0], g.generator_ab(turned(b))[0]
    loss = 0.5 * ((d.critic_b(fake_b.detach()) ** 2).mean() + ((d.critic_b(b) - 1) ** 2).mean())
    optimizers["discriminator"].zero_grad()
    loss.backward()
    optimizers["discriminator"].step()

    d.requires_grad_(False)

    def term(purpose: str, source: Tensor, made: Tensor) -> Tensor:
        queries = [turned(x) for x in g.generator_ab(made, config.nce_layers, encode_only=True)[1]]
        keys = g.generator_ab(source, config.nce_layers, encode_only=True)[1]
        losses = []
        for layer, head, query, key in zip(config.nce_layers, g.head.heads, queries, keys, strict=True):
            ids = draws.patch_ids(f"{purpose}.{layer}", math.prod(key.shape[2:]), config.nce_patches)
            losses.append(config.lambda_nce * nce(rows(head, query, ids), rows(head, key, ids)))
        return torch.stack(losses).mean()

    loss = ((d.critic_b(fake_b) - 1) ** 2).mean()
    if config.nce_identity:
        loss = loss + 0.5 * (term("ab", a, fake_b) + term("identity", b, identity_b))
    else:
        loss = loss + term("ab", a, fake_b)
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()
    d.requires_grad_(True)
