"""The ops in plain torch: the definition of correct, for any device and dtype that torch has."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_normalize(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Divide every row of `x` `[..., C]` by (its Euclidean norm + eps).

    The result is fp32, or fp64 for fp64. A row of zeros has no direction: it stays zero and gets no gradient, where the
    formula's would be 1 / eps and throw the weights away.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
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
    with torch.autocast(query.device.type, enabled=False):
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
