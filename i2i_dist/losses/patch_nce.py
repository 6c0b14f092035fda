"""PatchNCE over several layers: a patch of the output shall be nearest to the patch of the input at its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, distributed

from i2i_dist import ops


def patch_nce(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    temperature: float = 0.07,
    negatives: Literal["image", "global_batch"] = "image",
    eps: float = 1e-7,
) -> Tensor:
    """Return the PatchNCE loss: mean over rows, then mean over layers.

    Args:
        queries: For each layer `[N, P, D]`, raw projections of the generated images; carry the gradient.
        keys: For each layer `[N, P, D]`, raw projections of the source images at the same places; detached here.
        temperature: Divides the similarities.
        negatives: `"image"`: the other places of the same image (CUT); `"global_batch"`: the other places of all
            images on all ranks, which must hold equally many. The mean over ranks is then what one process would
            compute on the whole batch.
        eps: Added to the norms.

    Returns:
        A scalar, at least fp32.

    Raises:
        ValueError: For no layers, unequal numbers of layers or another `negatives`; shapes are checked by the op.

    Source: Park et al. 2020, equations 2 to 4; Han et al. 2021, equations 3 to 5.
    """
    if not queries or len(queries) != len(keys):
        raise ValueError(
            f"patch_nce was given queries of {len(queries)} layers and keys of {len(keys)}; "
            f"it needs as many of one as of the other, and at least one."
        )
    for query, key in zip(queries, keys, strict=True):
        if query.dim() != 3 or (query.size(0), query.size(2)) != (queries[0].size(0), queries[0].size(2)):
            raise ValueError(
                f"patch_nce was given layers of shapes {list(queries[0].shape)} and {list(query.shape)}; all must be "
                f"[N, P, D], and differ in nothing but P."
            )
        if query.shape != key.shape:
            raise ValueError(
                f"patch_nce was given queries of shape {list(query.shape)} with keys of shape {list(key.shape)}; a key "
                f"belongs to every query, so the shapes must be equal."
            )
    if negatives not in ("image", "global_batch"):
        raise ValueError(f"negatives {negatives!r} is not known; use 'image' or 'global_batch'.")
    rows = [query.flatten(0, 1) for query in queries]
    if negatives == "image":
        own = [key.detach().flatten(0, 1) for key in keys]
        losses = ops.patch_nce_losses(rows, own, groups=queries[0].size(0), temperature=temperature, eps=eps)
    else:
        gathered = [_gather(key.detach()) for key in keys]
        losses = tuple(
            ops.patch_nce_loss(query, key.flatten(0, 1), temperature=temperature, key_offset=offset, eps=eps)
            for query, (key, offset) in zip(rows, gathered, strict=True)
        )
    return torch.stack([loss.mean() for loss in losses]).mean()


def _gather(key: Tensor) -> tuple[Tensor, int]:
    """Return the keys of all ranks `[W * N, P, D]` in rank order, and the row at which this rank's begin."""
    if not distributed.is_available() or not distributed.is_initialized():
        return key, 0
    parts = [torch.empty_like(key) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, key.contiguous())
    return torch.cat(parts), distributed.get_rank() * key.size(0) * key.size(1)
