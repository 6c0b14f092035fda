"""What the plain loops of all methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GLOBAL_BATCH, SIZE, SEED = 4, 32, 3


def plain_nce(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """The papers' masked form, image by image, from cosine similarities."""
    losses = []
    for query, key in zip(queries, keys, strict=True):
        for q, k in zip(query, key.detach(), strict=True):
            similar = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
            positive = similar.diagonal()[:, None]
            negative = similar.masked_fill(torch.eye(len(q), dtype=torch.bool), -10.0)
            logits = torch.cat([positive, negative], dim=1) / 0.07
            losses.append(F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none"))
    return torch.cat(losses).mean()
