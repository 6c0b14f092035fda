"""PatchNCE: similarities, softmax and cross-entropy in one op, for one layer or for all layers of a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from i2i_dist.ops import _library, reference
from i2i_dist.ops._maps import FLOATING


def l2_normalize(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Divide every row of `x` by (its Euclidean norm + eps).

    Args:
        x: `[..., C]`, floating point.
        eps: Added to the norm. Whatever it is, a row of zeros stays zero and gets no gradient.

    Returns:
        `[..., C]`, fp32, or fp64 if `x` is fp64.

    Raises:
        ValueError: For an `x` that is not floating point.

    Source: the normalisation of Park et al. 2020 (eps 1e-7).
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; l2_normalize needs a floating point tensor.")
    return reference.l2_normalize(x, eps)


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
    """Return the InfoNCE loss of every query row against the keys of its group.

    With rows q_i and k_j normalised as x / (sqrt(sum x^2) + eps) and s_ij = q_i . k_j, row i has the loss
    `log(sum_j exp(s_ij / temperature)) - s_ip / temperature`, where p = i + key_offset is its positive.

    Args:
        query: `[Nq, C]`, raw head outputs, fp16, bf16, fp32 or fp64; the rows of one image are adjacent.
        key: `[Nk, C]`, raw head outputs of the same dtype and device. It receives a gradient if it requires one.
        groups: Number of images; query and key are cut into as many equal pieces, and rows see only their own piece.
        temperature: Divides the similarities, >= 1e-6.
        key_offset: Counted inside the group: the positive of the group's row i is its key i + key_offset. A group of
            queries may be shorter than its group of keys (keys gathered over ranks).
        eps: Added to the norms. Whatever it is, a row of zeros stays zero and gets no gradient.
        diagonal: None for the formula above. A number gives the papers' masked form: the row's logits are
            s_ip and all s_ij, with `diagonal` (-10 there) in place of s_ip, divided by the temperature.

    Returns:
        `[Nq]`: fp32, or fp64 for fp64 input.

    Raises:
        ValueError: For shapes, dtypes, devices or numbers that do not fit together.

    Source: van den Oord et al. 2018, equation 4; Park et al. 2020, equation 2.
    """
    (loss,) = patch_nce_losses(
        [query],
        [key],
        groups=groups,
        temperature=temperature,
        key_offset=key_offset,
        eps=eps,
        diagonal=diagonal,
    )
    return loss


def patch_nce_losses(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    groups: int = 1,
    temperature: float = 0.07,
    key_offset: int = 0,
    eps: float = 1e-7,
    diagonal: float | None = None,
) -> tuple[Tensor, ...]:
    """Return `patch_nce_loss` of every layer, computed together: on a GPU the launches are those of one layer.

    The gradient of the queries is computed on the way forward, where every tile of keys is at hand, and only scaled on
    the way back; keys that require a gradient cost a second sweep on the way back.

    Args:
        queries: For each layer `[Nq, C]`; `Nq` may differ between layers, C and dtype not.
        keys: For each layer `[Nk, C]`.
        groups: As for one layer; the same for all, like everything that follows.
        temperature: Divides the similarities, >= 1e-6.
        key_offset: The positive of a group's row i is its key i + key_offset.
        eps: Added to the norms.
        diagonal: None, or the similarity in place of the positive's in the papers' masked form.

    Returns:
        For each layer `[Nq]`: fp32, or fp64 for fp64 input.

    Raises:
        ValueError: For shapes, dtypes, devices or numbers that do not fit together.

    Source: van den Oord et al. 2018, equation 4; Park et al. 2020, equation 3.
    """
    if not queries or len(queries) != len(keys):
        raise ValueError(
            f"patch_nce_losses was given {len(queries)} queries and {len(keys)} keys; it needs as many of one as of "
            f"the other, and at least one."
        )
    for query, key in zip(queries, keys, strict=True):
        _check_tensors(query, key, queries[0])
        _check_numbers(query.size(0), key.size(0), groups, key_offset, temperature, eps)
    if not _library.use_native("patch_nce", queries[0].device.type):
        return tuple(
            reference.patch_nce_loss(
                query, key, groups=groups, temperature=temperature, key_offset=key_offset, eps=eps, diagonal=diagonal
            )
            for query, key in zip(queries, keys, strict=True)
        )
    with_gradient = torch.is_grad_enabled() and any(query.requires_grad for query in queries)
    loss, _, _ = torch.ops.i2i_dist.patch_nce(
        [_rows(query) for query in queries],
        [_rows(key) for key in keys],
        groups,
        temperature,
        key_offset,
        eps,
        diagonal,
        with_gradient,
    )
    return tuple(loss.split([query.size(0) for query in queries])) if len(queries) > 1 else (loss,)


def _rows(x: Tensor) -> Tensor:
    """Return `x` with the elements of a row adjacent, itself if they are."""
    return x if x.stride(1) == 1 else x.contiguous()


def _check_tensors(query: Tensor, key: Tensor, first: Tensor) -> None:
    if query.dim() != 2 or key.dim() != 2 or query.size(1) != key.size(1):
        raise ValueError(
            f"query has shape {list(query.shape)} and key {list(key.shape)}; they must be [Nq, C] and [Nk, C]. "
            f"Flatten images and places into rows."
        )
    if query.size(1) == 0:
        raise ValueError(f"query has shape {list(query.shape)}; its rows must have at least one element.")
    if query.dtype != key.dtype or query.dtype not in FLOATING:
        raise ValueError(
            f"query is {query.dtype} and key {key.dtype}; both must have the same dtype: fp16, bf16, fp32 or fp64."
        )
    if query.device != key.device:
        raise ValueError(f"query is on {query.device} and key on {key.device}; move them to one device.")
    if (query.size(1), query.dtype, query.device) != (first.size(1), first.dtype, first.device):
        raise ValueError(
            f"one layer has rows of {first.size(1)} elements, {first.dtype}, {first.device}, another of "
            f"{query.size(1)}, {query.dtype}, {query.device}; layers computed together must agree. Call patch_nce_loss "
            f"for each."
        )


def _check_numbers(rows: int, keys: int, groups: int, key_offset: int, temperature: float, eps: float) -> None:
    if type(groups) is not int or groups < 1 or rows < groups or rows % groups or keys % groups:
        raise ValueError(
            f"{rows} query rows and {keys} key rows cannot be cut into groups={groups} equal pieces; "
            f"give the number of images that both consist of."
        )
    if key_offset < 0 or rows // groups + key_offset > keys // groups:
        raise ValueError(
            f"key_offset={key_offset} places the positives of {rows // groups} rows at keys {key_offset} to "
            f"{key_offset + rows // groups - 1} of a group that has {keys // groups}; the offset is counted inside "
            f"the group and must leave every row its key."
        )
    if any(torch.is_tensor(number) for number in (temperature, eps)):
        raise ValueError("temperature and eps must be numbers; no gradient reaches them.")
    if not (1e-6 <= temperature < math.inf and 0 <= eps < math.inf):
        raise ValueError(f"temperature={temperature} must be >= 1e-6, eps={eps} must be >= 0, and both finite.")


def _fake(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    groups: int,
    temperature: float,
    key_offset: int,
    eps: float,
    diagonal: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    query, exact = queries[0], torch.promote_types(queries[0].dtype, torch.float32)
    rows = sum(query.size(0) for query in queries)
    prepared = torch.float32 if query.dtype == torch.float16 else query.dtype
    gradient = query.new_empty(rows if with_gradient else 0, query.size(1), dtype=prepared)
    return query.new_empty(rows, dtype=exact), query.new_empty(rows, 2, dtype=exact), gradient


def _fake_query_gradient(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _fake_key_gradient(
    queries: Sequence[Tensor], keys: Sequence[Tensor], statistics: Tensor, grad_loss: Tensor, *_: float
) -> Tensor:
    return keys[0].new_empty(sum(key.size(0) for key in keys), keys[0].size(1))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, *ctx.numbers, _ = inputs
    ctx.layers = len(queries)
    ctx.key_gradient = any(key.requires_grad for key in keys)
    _, statistics, gradient = output
    ctx.mark_non_differentiable(statistics, gradient)
    ctx.set_materialize_grads(False)  # or a gradient of `gradient` would be filled with zeros
    ctx.save_for_backward(*queries, *keys, statistics, gradient)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_loss is None:
        return [None] * ctx.layers, [None] * ctx.layers, *[None] * 6
    *rows, statistics, gradient = ctx.saved_tensors
    queries, keys = rows[: ctx.layers], rows[ctx.layers :]
    if torch.is_grad_enabled():
        found = _differentiable_gradients(queries, keys, grad_loss, ctx.numbers)
        return found[: ctx.layers], found[ctx.layers :], *[None] * 6
    grad_queries: Sequence[Tensor | None] = [None] * ctx.layers
    grad_keys: Sequence[Tensor | None] = [None] * ctx.layers
    grad_loss = grad_loss.contiguous()
    if any(query.requires_grad for query in queries):
        if gradient.size(0) == 0:
            raise ValueError("a query requires a gradient, but patch_nce was called with with_gradient=False.")
        scaled = torch.ops.i2i_dist.patch_nce_query_gradient(gradient, grad_loss).to(queries[0].dtype)
        grad_queries = scaled.split([query.size(0) for query in queries])
    if ctx.key_gradient:
        groups, temperature, key_offset, eps, _ = ctx.numbers
        grads = torch.ops.i2i_dist.patch_nce_key_gradient(
            queries, keys, statistics, grad_loss, groups, temperature, key_offset, eps
        )
        grad_keys = grads.split([key.size(0) for key in keys])
    return list(grad_queries), list(grad_keys), *[None] * 6


def _differentiable_gradients(
    queries: Sequence[Tensor], keys: Sequence[Tensor], grad_loss: Tensor, numbers: Sequence[Any]
) -> list[Tensor | None]:
    """Return the gradients of queries and keys as functions that can be differentiated again, by the definition."""
    groups, temperature, key_offset, eps, diagonal = numbers
    # As views, so that autograd stops at them.
    queries, keys = ([row.view_as(row) for row in rows] for rows in (queries, keys))
    losses = [
        reference.patch_nce_loss(
            query, key, groups=groups, temperature=temperature, key_offset=key_offset, eps=eps, diagonal=diagonal
        )
        for query, key in zip(queries, keys, strict=True)
    ]
    rows = [*queries, *keys]
    wanted = [row for row in rows if row.requires_grad]
    found = iter(torch.autograd.grad(torch.cat(losses), wanted, grad_loss, create_graph=True))
    return [next(found) if row.requires_grad else None for row in rows]


if _library.load().problem is None:
    register_fake("i2i_dist::patch_nce", _fake)
    register_fake("i2i_dist::patch_nce_query_gradient", _fake_query_gradient)
    register_fake("i2i_dist::patch_nce_key_gradient", _fake_key_gradient)
    register_autograd("i2i_dist::patch_nce", _backward, setup_context=_setup)
