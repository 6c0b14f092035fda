"""BicycleGAN: a tiny version, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from tests.methods.cases.common import GLOBAL_BATCH, SEED
from tests.networks import plain_styled as plain

# With 5 halvings, all that the size of these tests allows, there is no place for dropout.
SMALL: dict[str, Any] = {
    "width": 4, "downs": 5, "encoder_width": 4, "encoder_blocks": 3, "critic_width": 4, "critic_layers": 2, "lr": 0.001,
}  # fmt: skip


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The authors' code's step: two backwards before the generator's and the encoder's, the critics afterwards."""
    a, b = batch.a, batch.b
    g, e, d, d2 = (
        method.generator.generator_ab, method.generator.encoder,
        method.discriminator.critic_encoded, method.discriminator.critic_random,
    )  # fmt: skip
    draws, positions = Draws(SEED, number * GLOBAL_BATCH), torch.arange(0, GLOBAL_BATCH, 2) + number * GLOBAL_BATCH
    a_1, b_1, b_2 = a[0::2], b[0::2], b[1::2]

    def noise(purpose: str) -> Tensor:
        return draws.normal(purpose, positions, method.config.style_dim).double()

    def mse(logits: list[Tensor], target: float) -> Tensor:
        return sum(((scale - target) ** 2).mean() for scale in logits)  # type: ignore[return-value]

    mean, logvar = plain.encode(e, b_1)
    assert logvar is not None
    fake_encoded = plain.unet(g, a_1, mean + noise("encoded") * torch.exp(logvar / 2))
    code = noise("random")
    fake_random = plain.unet(g, a_1, code)
    recovered, _ = plain.encode(e, fake_random)

    method.discriminator.requires_grad_(False)
    optimizers["generator"].zero_grad()
    loss = mse(plain.critic(d, fake_encoded), 1.0) + mse(plain.critic(d2, fake_random), 1.0)
    loss = loss + 10 * (fake_encoded - b_1).abs().mean()
    divergence = (1 + logvar - mean.pow(2) - logvar.exp()) * -0.5
    (loss + 0.01 * divergence.sum() / len(b_1)).backward(retain_graph=True)
    e.requires_grad_(False)
    (0.5 * (recovered - code).abs().mean()).backward()
    e.requires_grad_(True)
    optimizers["generator"].step()

    method.discriminator.requires_grad_(True)
    optimizers["discriminator"].zero_grad()
    for critic, real, fake in ((d, b_1, fake_encoded), (d2, b_2, fake_random)):
        (mse(plain.critic(critic, fake.detach()), 0.0) + mse(plain.critic(critic, real), 1.0)).backward()
    optimizers["discriminator"].step()
