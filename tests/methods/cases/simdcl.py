"""SimDCL: a tiny version, and its update as a plain loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from tests.methods.cases.common import GLOBAL_BATCH, SEED, plain_nce

SMALL: dict[str, Any] = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 32, "nce_patches": 16,
    "nce_layers": ["down1", "down2", "block2"], "lr": 0.01, "lr_heads": 0.02,
}  # fmt: skip


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.to(x.dtype).T + layer.bias.to(x.dtype)


def normalised(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-7)


def mapped(net: Any, layers: list[Tensor]) -> Tensor:
    """Image by image: its layers [P, D] are the channels of one picture, and a vector comes out."""
    vectors = []
    for image in range(len(layers[0])):
        picture = torch.stack([layer[image] for layer in layers])[None]
        x = F.conv2d(picture, net.conv.weight, net.conv.bias, stride=2).relu()
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        vectors.append(normalised(linear(net.to_vector, linear(net.hidden, x).relu())))
    return torch.cat(vectors)


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The released code's step: every pass on its own, discriminators first."""
    a, b = batch.a, batch.b
    g, d, config = method.generator, method.discriminator, method.config
    draws = Draws(SEED, number * GLOBAL_BATCH)
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

    def features(purpose: str, image: Tensor, encoder: Any, head: Any) -> list[Tensor]:
        sampled = []
        for layer, mlp, x in zip(
            config.nce_layers, head.heads, encoder(image, config.nce_layers, encode_only=True)[1], strict=True
        ):
            ids = draws.patch_ids(f"{purpose}.{layer}", math.prod(x.shape[2:]), config.nce_patches)
            sampled.append(normalised(linear(mlp[2], linear(mlp[0], x.flatten(2)[:, :, ids].mT).relu())))
        return sampled

    of_a, of_b = (g.generator_ab, g.head_a), (g.generator_ba, g.head_b)
    real_a, real_b = features("ab", a, *of_a), features("ba", b, *of_b)
    similarity = F.l1_loss(
        mapped(g.mapping_real_a, real_a), mapped(g.mapping_fake_a, features("similarity_a", fake_a, *of_a))
    ) + F.l1_loss(mapped(g.mapping_real_b, real_b), mapped(g.mapping_fake_b, features("similarity_b", fake_b, *of_b)))
    loss = (
        0.5 * (F.relu(1 - d.critic_b(fake_b)).mean() + F.relu(1 - d.critic_a(fake_a)).mean())
        + 0.5 * (plain_nce(features("ab", fake_b, *of_b), real_a) + plain_nce(features("ba", fake_a, *of_a), real_b))
        + 0.5 * (F.l1_loss(identity_a, a) + F.l1_loss(identity_b, b))
        + 10.0 * similarity
    )
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()
    d.requires_grad_(True)
