"""PatchNCE for one layer: the public functions, which check their arguments and choose the implementation."""

from __future__ import annotations

from torch import Tensor

from i2i_dist.ops import _library, reference


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
    _library.choose_reference("l2_normalize", x.device.type)
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
        temperature: Divides the similarities, > 0.
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
    _check_tensors(query, key)
    _check_numbers(query.size(0), key.size(0), groups, key_offset, temperature, eps)
    _library.choose_reference("patch_nce_loss", query.device.type)
    return reference.patch_nce_loss(
        query, key, groups=groups, temperature=temperature, key_offset=key_offset, eps=eps, diagonal=diagonal
    )


def _check_tensors(query: Tensor, key: Tensor) -> None:
    if query.dim() != 2 or key.dim() != 2 or query.size(1) != key.size(1):
        raise ValueError(
            f"query has shape {list(query.shape)} and key {list(key.shape)}; they must be [Nq, C] and [Nk, C]. "
            f"Flatten images and places into rows."
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ValueError(f"query is {query.dtype} and key {key.dtype}; both must have the same floating point dtype.")
    if query.device != key.device:
        raise ValueError(f"query is on {query.device} and key on {key.device}; move them to one device.")


def _check_numbers(rows: int, keys: int, groups: int, key_offset: int, temperature: float, eps: float) -> None:
    if groups < 1 or rows < groups or rows % groups or keys % groups:
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
    if temperature <= 0 or eps < 0:
        raise ValueError(f"temperature={temperature} must be > 0 and eps={eps} must be >= 0.")
