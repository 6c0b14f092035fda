"""U-GAT-IT's networks written down a second time, as torch.nn.functional calls on a module's parameters and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(p: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    by = p[f"{name}.weight"].size(-1) // 2
    padded = F.pad(x, (by,) * 4, mode="reflect")
    return F.conv2d(padded, p[f"{name}.weight"], p.get(f"{name}.bias"), stride=stride)


def _instance(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    normal = (x - mean) / (variance + 1e-5).sqrt()
    if f"{name}.gamma" in p:
        normal = normal * p[f"{name}.gamma"][:, None, None] + p[f"{name}.beta"][:, None, None]
    return normal


def lin(x: Tensor, gamma: Tensor, beta: Tensor, rho: Tensor, correction: int) -> Tensor:
    """Layer-instance norm with gamma and beta [N, C, 1, 1] or [1, C, 1, 1], and rho [C]."""
    of_image = x - x.mean((2, 3), keepdim=True)
    of_image = of_image / (torch.var(x, (2, 3), correction=correction, keepdim=True) + 1e-5).sqrt()
    of_layer = x - x.mean((1, 2, 3), keepdim=True)
    of_layer = of_layer / (torch.var(x, (1, 2, 3), correction=correction, keepdim=True) + 1e-5).sqrt()
    share = rho[:, None, None]
    return (share * of_image + (1 - share) * of_layer) * gamma + beta


def _attention(
    x: Tensor,
    logit_weights: list[Tensor],
    channel_weights: list[Tensor],
    biases: list[Tensor],
    merge: Any,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The released form: two maps with their channels rescaled, side by side through a convolution."""
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1), F.adaptive_max_pool2d(x, 1).flatten(1)
    logits, maps = [], []
    for number, vector in enumerate(pooled):
        logit = F.linear(vector, logit_weights[number])
        weight = channel_weights[number].to(x.dtype)
        if biases:
            logit, weight = logit + biases[number], weight + biases[number]
        logits.append(logit)
        maps.append(x * weight[:, :, None, None])
    merged = F.conv2d(torch.cat(maps, 1), merge["weight"], merge["bias"])
    return F.leaky_relu(merged, slope), torch.cat(logits, 1)


def _merge(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": p["cam.merge.weight"], "bias": p["cam.merge.bias"]}


def generator(network: nn.Module, image: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the translated image, the attention's logits [N, 2] and the heat map [N, 1, H / 4, W / 4]."""
    p = dict(network.named_parameters())
    correction = {"unbiased": 1, "biased": 0}[config.variance]
    x = image
    for name, stride in (("stem", 1), ("down1", 2), ("down2", 2)):
        x = _instance(p, f"{name}.norm", _conv(p, f"{name}.conv", x, stride)).relu()
    for number in range(config.blocks):
        name = f"blocks.{number}"
        branch = _instance(p, f"{name}.norm1", _conv(p, f"{name}.conv1", x)).relu()
        x = x + _instance(p, f"{name}.norm2", _conv(p, f"{name}.conv2", branch))

    names = ["cam.of_mean"] * 2 if config.cam_shared else ["cam.of_mean", "cam.of_max"]
    weights = [p[f"{name}.weight"] for name in names]
    biases = [p[f"{name}.bias"] for name in names] if config.cam_shared else []
    x, logits = _attention(x, weights, weights, biases, _merge(p), 0.0)
    heat = x.sum(1, keepdim=True)

    read = x.mean((2, 3)) if config.light else F.adaptive_avg_pool2d(x, config.cam_grid).flatten(1)
    for layer in ("hidden1", "hidden2"):
        read = F.linear(read, p[f"style.{layer}.weight"], p.get(f"style.{layer}.bias")).relu()
    gamma, beta = (
        F.linear(read, p[f"style.{layer}.weight"], p.get(f"style.{layer}.bias"))[..., None, None]
        for layer in ("to_gamma", "to_beta")
    )
    for number in range(config.blocks):
        name = f"adaptive_blocks.{number}"
        rhos = [p[f"{name}.norm{which}.rho"] for which in (1, 2)]
        if config.rho_smoothing:
            rhos = [(rho - 0.1).clamp(0, 1) for rho in rhos]
        branch = lin(_conv(p, f"{name}.conv1", x), gamma, beta, rhos[0], correction).relu()
        x = x + lin(_conv(p, f"{name}.conv2", branch), gamma, beta, rhos[1], correction)
    for name in ("up1", "up2"):
        x = _conv(p, f"{name}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        scale, shift = (p[f"{name}.norm.{which}"][None, :, None, None] for which in ("gamma", "beta"))
        x = lin(x, scale, shift, p[f"{name}.norm.rho"], correction).relu()
    return _conv(p, "to_image", x).tanh(), logits, heat


def spectral(layer: Any) -> Tensor:
    """Move a layer's vectors on by one power iteration, and return its weight over the singular value found."""
    matrix = layer.weight.reshape(len(layer.weight), -1)
    with torch.no_grad():
        v = layer.u @ matrix
        layer.v.copy_(v / v.norm().clamp(min=1e-12))
        u = matrix @ layer.v
        layer.u.copy_(u / u.norm().clamp(min=1e-12))
        u, v = layer.u.clone(), layer.v.clone()
    return layer.weight / (u @ matrix @ v)


def critic(network: Any, image: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of patches [N, 1, h, w] and of the attention [N, 2]; every call moves the vectors on."""
    x = image
    for number, stage in enumerate(network.stages):
        last = number + 1 == len(network.stages)
        x = F.conv2d(F.pad(x, (1,) * 4, mode="reflect"), spectral(stage), stage.bias, stride=1 if last else 2)
        x = F.leaky_relu(x, 0.2)
    classifiers = [network.cam.of_mean] * 2 if config.cam_shared else [network.cam.of_mean, network.cam.of_max]
    normalised = [spectral(classifier) for classifier in classifiers]
    raw = [classifier.weight for classifier in classifiers]
    biases = [classifier.bias for classifier in classifiers] if config.cam_shared else []
    weights = normalised if config.cam_normalised else raw
    p = dict(network.named_parameters())
    x, logits = _attention(x, normalised, weights, biases, _merge(p), 0.2)
    last = network.to_patches
    return F.conv2d(F.pad(x, (1,) * 4, mode="reflect"), spectral(last), last.bias), logits


def judged(critics: Any, image: Tensor, domain: str, config: Any) -> list[Tensor]:
    """Return the four logits of an image of a domain: of patches and attention, global and local."""
    return [
        logits
        for depth in ("global", "local")
        for logits in critic(getattr(critics, f"{depth}_{domain}"), image, config)
    ]


def told_apart(source: Tensor, target: Tensor) -> Tensor:
    of_source = F.binary_cross_entropy_with_logits(source, torch.ones_like(source))
    return of_source + F.binary_cross_entropy_with_logits(target, torch.zeros_like(target))


def generator_terms(g: Any, d: Any, a: Tensor, b: Tensor, config: Any) -> dict[str, Tensor]:
    """All terms of the generators' turn, every pass on its own, in the released order."""
    fake_b, source_ab, _ = generator(g.generator_ab, a, config)
    fake_a, source_ba, _ = generator(g.generator_ba, b, config)
    cycled_a, _, _ = generator(g.generator_ba, fake_b, config)
    cycled_b, _, _ = generator(g.generator_ab, fake_a, config)
    identity_a, target_ba, _ = generator(g.generator_ba, a, config)
    identity_b, target_ab, _ = generator(g.generator_ab, b, config)
    of_a, of_b = judged(d, fake_a, "a", config), judged(d, fake_b, "b", config)
    return {
        "gan_ab": sum(F.mse_loss(logits, torch.ones_like(logits)) for logits in of_b),
        "gan_ba": sum(F.mse_loss(logits, torch.ones_like(logits)) for logits in of_a),
        "cycle_a": 10 * F.l1_loss(cycled_a, a),
        "cycle_b": 10 * F.l1_loss(cycled_b, b),
        "identity_a": 10 * F.l1_loss(identity_a, a),
        "identity_b": 10 * F.l1_loss(identity_b, b),
        "cam_ab": config.lambda_cam * told_apart(source_ab, target_ab),
        "cam_ba": config.lambda_cam * told_apart(source_ba, target_ba),
    }


def critic_terms(d: Any, real: dict[str, Tensor], fake: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Both terms of the critics' turn; keys of the images are "a" and "b"."""
    terms = {}
    for domain in ("a", "b"):
        of_real = judged(d, real[domain], domain, config)
        of_fake = judged(d, fake[domain], domain, config)
        terms[f"critic_{domain}"] = sum(F.mse_loss(logits, torch.ones_like(logits)) for logits in of_real) + sum(
            F.mse_loss(logits, torch.zeros_like(logits)) for logits in of_fake
        )
    return terms
