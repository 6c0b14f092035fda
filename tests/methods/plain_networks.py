"""The networks of CUT, DCLGAN and CycleGAN written down a second time, as torch.nn.functional calls on a module's
parameters, to hold methods against; and what the tests of these methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.methods import resolve

SIZE = 32


def build(section: dict[str, Any], scale: float = 10.0) -> Any:
    """A method in fp64, with weights large enough that nothing hides in rounding or behind a hinge."""
    method_class, config = resolve(section)
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for side in (method.generator, method.discriminator):
            side.double()
            for parameter in side.parameters():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.mul_(scale).add_(noise, alpha=0.05)
    return method


def batch(images: int) -> Batch:
    draw = torch.Generator().manual_seed(5)
    a, b = (torch.rand(images, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Batch(a, b.abs(), torch.arange(images) + 64, 64)


def _normal(x: Tensor) -> Tensor:
    # F.instance_norm on CPUs, for one image: a wrong gradient where the one that comes in lies channels last.
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def _padded(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (by,) * 4, mode="reflect")


def _halved(x: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    return F.conv2d(_padded(x, 1), kernel.expand(x.size(1), 1, 3, 3), stride=2, groups=x.size(1))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def generator_maps(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return every feature map that can be tapped, and the translated image as "image"."""
    p = dict(network.named_parameters())

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=padding)

    maps = {"rgb": _padded(image, 3)}
    maps["down1"] = conv("down1", _normal(conv("stem", maps["rgb"])).relu(), 1)
    maps["down2"] = conv("down2", _halved(_normal(maps["down1"]).relu()), 1)
    x, number = _halved(_normal(maps["down2"]).relu()), 0
    while f"blocks.{number}.conv1.weight" in p:
        branch = _normal(conv(f"blocks.{number}.conv1", _padded(x, 1))).relu()
        x = x + _normal(conv(f"blocks.{number}.conv2", _padded(branch, 1)))
        number += 1
        maps[f"block{number}"] = x
    x = _normal(conv("up1.conv", _doubled(x), 1)).relu()
    x = _normal(conv("up2.conv", _doubled(x), 1)).relu()
    maps["image"] = conv("to_image", _padded(x, 3)).tanh()
    return maps


def logits(network: nn.Module, image: Tensor) -> Tensor:
    """Judge an image as the anti-aliased PatchGAN with three halvings does."""
    p = dict(network.named_parameters())

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)

    x = _halved(F.leaky_relu(conv("stages.0", image), 0.2))
    for stage in (1, 2):
        x = _halved(F.leaky_relu(_normal(conv(f"stages.{stage}", x)), 0.2))
    return conv("to_logits", F.leaky_relu(_normal(conv("stages.3", x)), 0.2))


def strided_image(network: nn.Module, image: Tensor) -> Tensor:
    """Translate an image as CycleGAN's generator does: strided convolutions down, transposed ones up."""
    p = dict(network.named_parameters())

    def conv(name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)

    x = _normal(conv("stem", _padded(image, 3))).relu()
    for name in ("down1", "down2"):
        x = _normal(conv(name, x, stride=2, padding=1)).relu()
    number = 0
    while f"blocks.{number}.conv1.weight" in p:
        branch = _normal(conv(f"blocks.{number}.conv1", _padded(x, 1))).relu()
        x = x + _normal(conv(f"blocks.{number}.conv2", _padded(branch, 1)))
        number += 1
    for name in ("up1.conv", "up2.conv"):
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        x = _normal(F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)).relu()
    return conv("to_image", _padded(x, 3)).tanh()


def strided_logits(network: nn.Module, image: Tensor) -> Tensor:
    """Judge an image as CycleGAN's PatchGAN does, with strided convolutions."""
    p, x = dict(network.named_parameters()), image
    for stage, stride in enumerate((2, 2, 2, 1)):
        x = F.conv2d(x, p[f"stages.{stage}.weight"], p[f"stages.{stage}.bias"], stride=stride, padding=1)
        x = F.leaky_relu(_normal(x) if stage else x, 0.2)
    return F.conv2d(x, p["to_logits.weight"], p["to_logits.bias"], padding=1)


def normalised(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True).sqrt() + 1e-7)


def head_rows(head: nn.Module, layer: int, features: Tensor, ids: Tensor) -> Tensor:
    """Return the head's normalised rows [N, P, D] of the map [N, C, H, W] at `ids`."""
    p = dict(head.named_parameters())
    rows = features.permute(0, 2, 3, 1).flatten(1, 2)[:, ids]
    hidden = F.linear(rows, p[f"heads.{layer}.0.weight"], p[f"heads.{layer}.0.bias"]).relu()
    return normalised(F.linear(hidden, p[f"heads.{layer}.2.weight"], p[f"heads.{layer}.2.bias"]))


def nce(query: Tensor, key: Tensor) -> Tensor:
    """PatchNCE of one layer from normalised rows [N, P, D], image by image, the diagonal at -10 among the others."""
    rows = []
    for q, k in zip(query, key.detach(), strict=True):
        similar = q @ k.T
        others = similar.masked_fill(torch.eye(len(q)).bool(), -10.0)
        classes = torch.cat([similar.diag()[:, None], others], 1) / 0.07
        rows.append(F.cross_entropy(classes, torch.zeros(len(q), dtype=torch.long), reduction="none"))
    return torch.cat(rows).mean()


def gradients(module: nn.Module, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, float(other[name].detach().abs().max()))
        assert float((one[name] - other[name]).detach().abs().max()) <= tolerance * scale, name
