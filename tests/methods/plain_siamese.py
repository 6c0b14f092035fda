"""OP-GAN's siamese network and its two losses written down a second time: one pair of patches after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patch(image: Tensor, cell: int) -> Tensor:
    """Return a cell of the 3 x 3 grid in the middle of an image [1, 3, H, W]."""
    height, width = image.size(2) // 3, image.size(3) // 3
    top = (image.size(2) - 3 * height) // 2 + cell // 3 * height
    left = (image.size(3) - 3 * width) // 2 + cell % 3 * width
    return image[:, :, top : top + height, left : left + width]


def _normal(x: Tensor) -> Tensor:
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def _averaged(x: Tensor) -> Tensor:
    """To 11 x 11 places, each the mean of all pixels that it touches."""
    height, width = x.shape[2:]
    rows = [x[:, :, i * height // 11 : -(-(i + 1) * height // 11)].mean(2) for i in range(11)]
    x = torch.stack(rows, dim=2)
    return torch.stack([x[..., i * width // 11 : -(-(i + 1) * width // 11)].mean(3) for i in range(11)], dim=3)


def _conv(network: nn.Module, name: str, x: Tensor, **how: int) -> Tensor:
    p = dict(network.named_parameters())
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)


def trunk(network: nn.Module, image: Tensor) -> Tensor:
    x = _normal(_conv(network, "stem", image, padding=3)).relu()
    for number in range(3):
        x = _normal(_conv(network, f"halvings.{number}", x, stride=2, padding=1)).relu()
    return _averaged(x)


def content_map(network: nn.Module, image: Tensor) -> Tensor:
    content = _normal(_conv(network, "content", trunk(network, image), padding=1)).relu()
    return torch.sigmoid(_conv(network, "to_map", content))[0, 0]


def domain_logits(network: nn.Module, one: Tensor, other: Tensor) -> Tensor:
    features = [F.leaky_relu(_conv(network, "domain", trunk(network, image), padding=1), 0.2) for image in (one, other)]
    hidden = F.leaky_relu(_conv(network, "pair", torch.cat(features, dim=1), stride=2, padding=1), 0.2).mean((2, 3))
    p = dict(network.named_parameters())
    return F.linear(hidden, p["to_domains.weight"], p["to_domains.bias"])


def terms(
    network: nn.Module, sources: Tensor, translations: Tensor, cells: list[list[list[int]]], source_domain: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return content registration, domain classification and what the spread lacks to 0.2, of one direction, as means.

    `cells[n][r]` are those of picture n: two of the source for D1, that of C2 in the source, that of C1, that of C2 in
    the translation, two of the translation for D2. The domains are 0 for A and 1 for B; a pair of both is class 2.
    """
    content: list[Tensor] = []
    domain: list[Tensor] = []
    short: list[Tensor] = []

    def classify(one: Tensor, other: Tensor, known: int) -> None:
        domain.append(F.cross_entropy(domain_logits(network, one, other), torch.tensor([known])))

    for number, rounds in enumerate(cells):
        source, translated = sources[number : number + 1], translations[number : number + 1]
        for first, second, there, same, here, third, fourth in rounds:
            classify(patch(source, first), patch(source, second), source_domain)
            classify(patch(translated, third), patch(translated, fourth), 1 - source_domain)
            classify(patch(source, same), patch(translated, same), 2)
            classify(patch(source, there), patch(translated, here), 2)
            maps = [content_map(network, patch(image, same)) for image in (source, translated)]
            content.append(((maps[0] - maps[1]) ** 2).sum() / (11 * 11))
            four = torch.stack([content_map(network, patch(source, cell)) for cell in (first, second, there, same)])
            spread = ((four - four.mean(0)).square().mean() + 1e-6).sqrt()
            short.append((0.2 - spread).clamp(min=0))
    return torch.stack(content).mean(), torch.stack(domain).mean(), torch.stack(short).mean()


def cells_of(draws: Any, direction: str, positions: Tensor, rounds: int) -> list[list[list[int]]]:
    drawn = [draws.distinct(f"cells.{direction}.{number}", positions, 9, 7) for number in range(rounds)]
    return [[one[sample].tolist() for one in drawn] for sample in range(len(positions))]
