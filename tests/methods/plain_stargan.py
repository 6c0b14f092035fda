"""StarGAN's and MatchGAN's networks and terms written once more, with torch.nn.functional alone, a pass for each thing.

The weights are taken in the dtype of the pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def normal(norm: Any, x: Tensor) -> Tensor:
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    scale, shift = (p.to(x.dtype).reshape(1, -1, 1, 1) for p in (norm.gamma, norm.beta))
    return scale * (x - mean) / (variance + 1e-5).sqrt() + shift


def generator(net: Any, image: Tensor, labels: Tensor) -> Tensor:
    def weight(layer: Any) -> Tensor:
        found: Tensor = layer.weight.to(image.dtype)
        return found

    maps = labels.reshape(*labels.shape, 1, 1).repeat(1, 1, image.size(2), image.size(3))
    x = F.conv2d(torch.cat([image, maps], dim=1), weight(net.stem), padding=3)
    x = F.relu(normal(net.stem_norm, x))
    for conv, norm in ((net.down1, net.down1_norm), (net.down2, net.down2_norm)):
        x = F.relu(normal(norm, F.conv2d(x, weight(conv), stride=2, padding=1)))
    for block in net.blocks:
        inner = F.relu(normal(block.norm1, F.conv2d(x, weight(block.conv1), padding=1)))
        x = x + normal(block.norm2, F.conv2d(inner, weight(block.conv2), padding=1))
    for conv, norm in ((net.up1, net.up1_norm), (net.up2, net.up2_norm)):
        x = F.relu(normal(norm, F.conv_transpose2d(x, weight(conv), stride=2, padding=1)))
    return torch.tanh(F.conv2d(x, weight(net.to_image), padding=3))


def trunk(net: Any, image: Tensor) -> Tensor:
    x = image
    for stage in net.stages:
        x = F.conv2d(x, stage.weight.to(x.dtype), stage.bias.to(x.dtype), stride=2, padding=1)
        x = torch.where(x > 0, x, 0.01 * x)
    return x


def realness(net: Any, image: Tensor) -> Tensor:
    x = trunk(net, image)
    return F.conv2d(x, net.to_patches.weight.to(x.dtype), padding=1)


def head(layer: Any, x: Tensor) -> Tensor:
    """A convolution as large as its map."""
    return x.flatten(1) @ layer.weight.to(x.dtype).flatten(1).T


def penalty(net: Any, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    share = alpha.reshape(-1, 1, 1, 1).to(real.dtype)
    x = (share * real.data + (1 - share) * fake.data).requires_grad_(True)
    y = realness(net, x)
    (slope,) = torch.autograd.grad(outputs=y, inputs=x, grad_outputs=torch.ones_like(y), create_graph=True)
    length = torch.sqrt(torch.sum(slope.view(slope.size(0), -1) ** 2, dim=1))
    return torch.mean((length - 1) ** 2)


def of_attributes(net: Any, image: Tensor, labels: Tensor) -> Tensor:
    """What is read of attributes that are there or not, as in CelebA."""
    logits = head(net.to_classes, trunk(net, image))
    terms = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return terms.sum() / logits.size(0)


def of_choice(net: Any, image: Tensor, labels: Tensor) -> Tensor:
    """What is read of attributes of which exactly one is there, as in RaFD."""
    return F.cross_entropy(head(net.to_classes, trunk(net, image)), labels.argmax(1))


def comparison(net: Any, grouped: Tensor) -> Tensor:
    """What is said of pairs of pictures [k classes, m of each, 3, S, S], for m of 2 or 4 and k > 2 or m of 2."""
    h = trunk(net, grouped.flatten(0, 1)).unflatten(0, grouped.shape[:2])
    if h.size(1) == 2:
        positive, negative = [(h[:, 0], h[:, 1])], [(h[:, 0], h[:, 1].roll(1, 0))]
    else:
        positive = [(h[:, 0], h[:, 1]), (h[:, 2], h[:, 1])]
        negative = [(h[:, 2], h[:, 3].roll(1, 0)), (h[:, 0], h[:, 3].roll(2, 0))]
    losses = []
    for pairs, said in ((positive, 1), (negative, 0)):
        for first, second in pairs:
            logits = head(net.to_match, torch.cat([first, second], dim=1))
            true = torch.full((logits.size(0),), said, dtype=torch.int64)
            losses.append(F.cross_entropy(logits, true, reduction="none"))
    return torch.cat(losses).mean()


def by_label(images: Tensor, classes: int, each: int) -> list[Tensor]:
    """Cut a batch into its groups, each [classes, each, 3, S, S]."""
    return [group.unflatten(0, (classes, each)) for group in images.split(classes * each)]


def by_target(images: Tensor, classes: int, each: int) -> list[Tensor]:
    """The same, of translations: pictures that follow each other have different targets."""
    groups = images.split(classes * each)
    return [torch.stack([group[target::classes] for target in range(classes)]) for group in groups]
