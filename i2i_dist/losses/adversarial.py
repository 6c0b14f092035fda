"""The adversarial game's losses on logits: least squares, binary cross-entropy, hinge and Wasserstein."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["lsgan", "vanilla", "hinge", "hinge_standard", "wgan"]


def discriminator_loss(kind: Kind, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the real term plus the fake term, each a mean over all logits; no factor 1/2.

    Args:
        kind: `"lsgan"`: (p - 1)^2 and p^2; `"vanilla"`: cross-entropy with 1 and 0; `"hinge"` and
            `"hinge_standard"`: max(0, 1 - p) and max(0, 1 + p); `"wgan"`: -p and p.
        real_logits: Logits of real images, any shape.
        fake_logits: Logits of generated images, any shape.

    Returns:
        A scalar, at least fp32.

    Raises:
        ValueError: For another `kind`.

    Source: Mao et al. 2017; Goodfellow et al. 2014; Lim and Ye 2017; Arjovsky et al. 2017.
    """
    real, fake = _exact(real_logits), _exact(fake_logits)
    if _known(kind) == "lsgan":
        return (real - 1).square().mean() + fake.square().mean()
    if kind == "vanilla":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "wgan":
        return fake.mean() - real.mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(kind: Kind, fake_logits: Tensor) -> Tensor:
    """Return the generator's loss, a mean over all logits of generated images.

    Args:
        kind: `"lsgan"`: (p - 1)^2; `"vanilla"`: cross-entropy with 1; `"hinge"`: max(0, 1 - p), clamped as in the
            official DCLGAN code, without gradient where p > 1; `"hinge_standard"` and `"wgan"`: -p.
        fake_logits: Logits of generated images, any shape.

    Returns:
        A scalar, at least fp32.

    Raises:
        ValueError: For another `kind`.
    """
    fake = _exact(fake_logits)
    if _known(kind) == "lsgan":
        return (fake - 1).square().mean()
    if kind == "vanilla":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return F.relu(1 - fake).mean()
    return -fake.mean()


def _known(kind: Kind) -> Kind:
    if kind not in get_args(Kind):
        raise ValueError(f"adversarial loss {kind!r} is not known; use one of {', '.join(get_args(Kind))}.")
    return kind


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
