"""The networks of pix2pix written once more: nested as in the authors' code, with torch.nn.functional alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def batch_norm(layer: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, layer.weight.to(x.dtype), layer.bias.to(x.dtype), training=True)


def unet(network: Any, image: Tensor, keep: Sequence[Tensor] = (), rate: float = 0.5) -> Tensor:
    """`keep` goes from the innermost place outwards: there is one for each of the stages 4 ... downs - 2."""
    deepest = len(network.downs) - 1

    def block(x: Tensor, level: int) -> Tensor:
        y = F.conv2d(F.leaky_relu(x, 0.2, inplace=True), network.downs[level].weight, stride=2, padding=1)
        if level < deepest:
            y = block(batch_norm(network.down_norms[level - 1], y), level + 1)
        stage = deepest - level
        y = F.conv_transpose2d(F.relu(y, inplace=True), network.ups[stage].weight, stride=2, padding=1)
        y = batch_norm(network.up_norms[stage], y)
        if rate and 4 <= level < deepest:
            y = torch.where(keep[stage - 1], y / (1 - rate), 0.0)
        return torch.cat([x, y], 1)

    inner = F.relu(block(F.conv2d(image, network.downs[0].weight, stride=2, padding=1), 1))
    last = network.to_image
    return F.conv_transpose2d(inner, last.weight, last.bias, stride=2, padding=1).tanh()


def critic(network: Any, source: Tensor, image: Tensor) -> Tensor:
    """The plain PatchGAN with batch norm over a pair of images."""
    first, *others = network.stages
    x = F.conv2d(torch.cat([source, image], 1), first.weight, first.bias, stride=2, padding=1)
    for stride, stage, norm in zip((2, 2, 1), others, network.norms, strict=True):
        x = F.conv2d(F.leaky_relu(x, 0.2), stage.weight, stride=stride, padding=1)
        x = batch_norm(norm, x)
    return F.conv2d(F.leaky_relu(x, 0.2), network.to_logits.weight, network.to_logits.bias, padding=1)
