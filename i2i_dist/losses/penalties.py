"""The gradient penalty, which keeps a Wasserstein critic from growing steeper than 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from i2i_dist.ops.precision import outside_autocast


def gradient_norms(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return how steep a critic is at each image, to be differentiated again.

    Also where gradients are off; and outside autocast, since a gradient's gradient needs the digits.

    Args:
        critic: Maps images to values of any shape `[N, ...]`, each image by itself.
        images: `[N, ...]`, taken as constants.

    Returns:
        `[N]`, at least fp32: the Euclidean norms of the gradients of each image's values, added up. At a gradient of
        zeros the norm has the gradient 0.

    Source: Gulrajani et al. 2017, equation 3; summed over the patches as StarGAN's authors do.
    """
    with torch.enable_grad(), outside_autocast(images):
        exact = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(exact).sum(), exact, create_graph=True)
        norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return norms


def gradient_penalty(norms: Tensor) -> Tensor:
    """Return the mean of (norm - 1)^2 over `norms` `[N]`."""
    return (norms - 1).square().mean()
