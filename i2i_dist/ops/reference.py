"""The ops in plain torch: the definition of correct, for any device and dtype that torch has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.ops.precision import outside_autocast


def l2_normalize(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Divide every row of `x` `[..., C]` by (its Euclidean norm + eps).

    The result is fp32, or fp64 for fp64. A row of zeros has no direction: it stays zero and gets no gradient, where the
    formula's would be 1 / eps and throw the weights away.
    """
    exact = _exact(x)
    norm: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return exact / torch.where(norm > 0, norm + eps, torch.inf)


def patch_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    groups: int = 1,
    temperature: float = 0.07,
    key_offset: int = 0,
    eps: float = 1e-7,
    diagonal: float | None = None,
) -> Tensor:
    """Return each row's loss `[Nq]`; `i2i_dist.ops.patch_nce_loss` says what the arguments mean."""
    with outside_autocast(query):
        q = l2_normalize(query, eps).unflatten(0, (groups, -1))  # [G, P, C]
        k = l2_normalize(key, eps).unflatten(0, (groups, -1))  # [G, K, C]
        similarity = q @ k.mT  # [G, P, K]
        positive = similarity.diagonal(key_offset, 1, 2)[:, : q.size(1)].unsqueeze(-1)  # [G, P, 1]
        if diagonal is not None:
            masked = torch.diagonal_scatter(similarity, positive.new_full(q.shape[:2], diagonal), key_offset, 1, 2)
            similarity = torch.cat([positive, masked], dim=-1)
        # Relative to the positive, the loss of a row that is nearly solved keeps all its digits.
        relative: Tensor = (similarity - positive) / temperature
        return relative.logsumexp(-1).flatten()


def adalin(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rho: Tensor,
    *,
    eps: float = 1e-5,
    unbiased: bool = True,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Return `[N, C, H, W]` in the dtype of `x`; `i2i_dist.ops.adalin` says what the arguments mean."""
    exact = _exact(x)
    mixed = rho[:, None, None] * _normalised(exact, (2, 3), eps, unbiased)
    mixed = mixed + (1 - rho[:, None, None]) * _normalised(exact, (1, 2, 3), eps, unbiased)
    return _finish(gamma[..., None, None] * mixed + beta[..., None, None], x.dtype, activation, residual)


def instance_norm_act(
    x: Tensor, *, eps: float = 1e-5, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return `[N, C, H, W]` in the dtype of `x`; `i2i_dist.ops.instance_norm_act` says what the arguments mean."""
    exact = _exact(x)
    # On a CPU, group_norm is the faster of torch's two forms of the same thing.
    normalised = F.instance_norm(exact, eps=eps) if x.is_cuda else F.group_norm(exact, exact.size(1), eps=eps)
    return _finish(normalised, x.dtype, activation, residual)


def patch_gather(features: Tensor, ids: Tensor) -> Tensor:
    """Return `[N, P, C]`: the features `[N, C, H, W]` at the places `ids` `[P]`, each row * W + column."""
    return features.flatten(2).index_select(2, ids).mT.contiguous()


SLOPES = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2}
"""The activations of the norms, as the slope for negative values."""


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float, unbiased: bool) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=int(unbiased), keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _finish(y: Tensor, dtype: torch.dtype, activation: str, residual: Tensor | None) -> Tensor:
    if activation != "none":
        y = F.leaky_relu(y, SLOPES[activation])
    return (y if residual is None else y + residual).to(dtype)
