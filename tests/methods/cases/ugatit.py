"""U-GAT-IT: a tiny version of the full form, and its update as a plain loop."""

from __future__ import annotations

from typing import Any

import torch

from i2i_dist.data.batch import Batch
from tests.methods import plain_ugatit as plain

# Pictures of 32 x 32 have attended maps of 8 x 8, which are pooled. With the official 1000 no rate suits both sides.
SMALL: dict[str, Any] = {
    "width": 4, "blocks": 1, "cam_grid": 4, "critic_width": 4, "global_layers": 5, "local_layers": 4,
    "lambda_cam": 10.0, "lr": 0.001, "weight_decay": 0.01,
}  # fmt: skip


def step(method: Any, batch: Batch, number: int, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The authors' PyTorch code's step: critics first, fakes made anew for each turn, rho clipped at the end."""
    a, b = batch.a, batch.b
    g, d, config = method.generator, method.discriminator, method.config
    with torch.no_grad():
        fakes = {"a": plain.generator(g.generator_ba, b, config)[0], "b": plain.generator(g.generator_ab, a, config)[0]}
    loss = sum(plain.critic_terms(d, {"a": a, "b": b}, fakes, config).values())
    optimizers["discriminator"].zero_grad()
    loss.backward()
    optimizers["discriminator"].step()

    loss = sum(plain.generator_terms(g, d, a, b, config).values())
    optimizers["generator"].zero_grad()
    loss.backward()
    optimizers["generator"].step()
    for module in g.modules():
        if hasattr(module, "rho"):
            module.rho.data = module.rho.data.clamp(0, 1)
