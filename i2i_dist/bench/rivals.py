"""What the kernels are measured against: the published methods' own formulations, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
EPS = 1e-5


def unit_rows(x: Tensor) -> Tensor:
    """Return the rows of `x` `[..., C]` divided by (their length + 1e-7), as CUT writes it."""
    return x / (x.pow(2).sum(-1, keepdim=True).pow(0.5) + 1e-7)


def patch_nce(queries: Sequence[Tensor], keys: Sequence[Tensor], groups: int) -> Tensor:
    """Return the loss of all layers as CUT computes it: for each layer the logits of the positive and of all others.

    Source: Park et al. 2020; queries and keys `[groups * P, C]`, the mean over rows and then over layers.
    """
    layers = []
    for query, key in zip(queries, keys, strict=True):
        q, k = unit_rows(query), unit_rows(key.detach())
        positive = torch.bmm(q[:, None, :], k[:, :, None]).squeeze(-1)  # [groups * P, 1]
        similar = torch.bmm(q.unflatten(0, (groups, -1)), k.unflatten(0, (groups, -1)).mT)  # [groups, P, P]
        own_place = torch.eye(similar.size(1), dtype=torch.bool, device=q.device)[None]
        negative = similar.masked_fill(own_place, -10.0).flatten(0, 1)
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        label = torch.zeros(len(q), dtype=torch.long, device=q.device)
        layers.append(F.cross_entropy(logits, label, reduction="none").mean())
    return torch.stack(layers).mean()


def attention(query: Tensor, key: Tensor) -> Tensor:
    """Return sum_j p_ij k_j `[layers, groups, P, C]` for rows of unit length: attention whose values are its keys."""
    return F.scaled_dot_product_attention(query, key, key, scale=1 / TEMPERATURE)


def adalin(x: Tensor, gamma: Tensor, beta: Tensor, rho: Tensor) -> Tensor:
    """Return AdaLIN as U-GAT-IT computes it; x `[N, C, H, W]`, gamma and beta `[N, C]`, rho `[C]`.

    Source: Kim et al. 2020, equation 1, with the unbiased variance of the released code.
    """
    instance = (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(torch.var(x, dim=(2, 3), keepdim=True) + EPS)
    layer = (x - x.mean((1, 2, 3), keepdim=True)) / torch.sqrt(torch.var(x, dim=(1, 2, 3), keepdim=True) + EPS)
    share = rho[None, :, None, None].expand(len(x), -1, -1, -1)
    mixed = share * instance + (1 - share) * layer
    return mixed * gamma[:, :, None, None] + beta[:, :, None, None]


def iln(x: Tensor, gamma: Tensor, beta: Tensor, rho: Tensor) -> Tensor:
    """Return `adalin` with gamma and beta `[C]` shared by the images, as in U-GAT-IT's upsampling half."""
    return adalin(x, gamma.expand(len(x), -1), beta.expand(len(x), -1), rho)


def instance_norm(x: Tensor) -> Tensor:
    """Return `x` `[N, C, H, W]` normalised and rectified by torch's own instance norm."""
    return F.relu(F.instance_norm(x, eps=EPS))


def group_norm(x: Tensor) -> Tensor:
    """Return the same by torch's group norm in fp32 with one channel in each group."""
    return F.relu(F.group_norm(x.float(), x.size(1), eps=EPS)).to(x.dtype)


def gather(features: Tensor, ids: Tensor) -> Tensor:
    """Return `[N, P, C]` as CUT samples `[N, C, H, W]`: permuted, flattened, indexed."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)[:, ids, :]
