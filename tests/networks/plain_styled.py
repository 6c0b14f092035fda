"""The networks of BicycleGAN written once more: nested as in the authors' code, with torch.nn.functional alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def normal(x: Tensor) -> Tensor:
    # F.instance_norm on CPUs, for one image: a wrong gradient where the one that comes in lies channels last.
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def conv(layer: Any, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=padding)


def unet(network: Any, image: Tensor, code: Tensor, keep: Sequence[Tensor] = (), rate: float = 0.5) -> Tensor:
    """`keep` goes from the innermost place outwards: there is one for each of the levels 4 ... downs - 2."""
    deepest = len(network.downs) - 1

    def block(x: Tensor, level: int) -> Tensor:
        y = torch.cat([x, code.reshape(*code.shape, 1, 1).expand(*code.shape, x.size(2), x.size(3))], 1)
        y = conv(network.downs[level], F.leaky_relu(y, 0.2) if level else y, stride=2)
        if level < deepest:
            y = block(normal(y) if level else y, level + 1)
        up = network.ups[deepest - level] if level else network.to_image
        y = F.conv_transpose2d(F.relu(y), up.weight, up.bias, stride=2, padding=1)
        if level == 0:
            return y.tanh()
        y = normal(y)
        if len(keep) and 4 <= level < deepest:
            y = torch.where(keep[deepest - level - 1], y / (1 - rate), 0.0)
        return torch.cat([y, x], 1)

    return block(image, 0)


def encode(network: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the mean and, where there is a layer for it, the logarithm of the variance."""
    x = conv(network.stem, image, stride=2)
    for block in network.blocks:
        inner = conv(block.conv1, F.leaky_relu(normal(x), 0.2))
        inner = conv(block.conv2, F.leaky_relu(normal(inner), 0.2))
        x = F.avg_pool2d(inner, 2, 2) + conv(block.shortcut, F.avg_pool2d(x, 2, 2), padding=0)
    pooled = F.avg_pool2d(F.leaky_relu(x, 0.2), (x.size(2), x.size(3))).flatten(1)

    def linear(layer: Any) -> Tensor:
        return pooled @ layer.weight.to(pooled.dtype).T + layer.bias.to(pooled.dtype)

    return linear(network.to_mean), None if network.to_logvar is None else linear(network.to_logvar)


def critic(network: Any, image: Tensor) -> list[Tensor]:
    """Return the logits of each scale."""
    found = []
    for scale in network.scales:
        x = image
        for stage, layer in enumerate(scale.stages):
            x = conv(layer, x, stride=1 if stage == len(scale.stages) - 1 else 2)
            x = F.leaky_relu(normal(x) if stage else x, 0.2)
        found.append(conv(scale.to_logits, x))
        image = F.avg_pool2d(image, 3, stride=2, padding=[1, 1], count_include_pad=False)
    return found
