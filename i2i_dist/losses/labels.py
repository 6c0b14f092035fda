"""Losses on labels: what a picture shows, and whether two of them show the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def classification(logits: Tensor, labels: Tensor, choices: Sequence[Sequence[int]], free: Sequence[int]) -> Tensor:
    """Return the cross-entropy of labels: softmax over each choice, and the sum of all free attributes' own.

    Args:
        logits: `[N, L]`.
        labels: `[N, L]` of 0 and 1.
        choices: Places of attributes of which exactly one holds, group by group.
        free: Places of all other attributes.

    Returns:
        A mean over the N pictures and a sum over the rest, as a scalar, at least fp32.

    Source: Choi et al. 2018, equations 2 and 3; sums and means as in the authors' code.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    true = labels.to(exact.dtype)
    terms = []
    for choice in choices:
        places = _places(tuple(choice), exact.device)
        terms.append(F.cross_entropy(exact[:, places], true[:, places].argmax(1)))
    if free:
        places = _places(tuple(free), exact.device)
        summed = F.binary_cross_entropy_with_logits(exact[:, places], true[:, places], reduction="sum")
        terms.append(summed / len(exact))
    return torch.stack(terms).sum()


@functools.cache
def _places(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an index that lies on the device: a list would be copied there, with a wait, each time it is used."""
    return torch.tensor(places, device=device)


def match_pairs(classes: int, images: int) -> tuple[Tensor, Tensor]:
    """Return which pictures of a group are compared, half of them with one of their own class.

    A group has `classes` x `images` pictures, class by class; member m of class i is row i * images + m. In blocks of
    four members there are, for each class i, the pairs (m0, m1) and (m2, m1) of i, and as others (m0 of i, m3 of
    i - 2) and (m2 of i, m3 of i - 1), classes counted around. Two members that remain make (m0, m1) of i and (m0 of
    i, m1 of i - 1). With two classes, i - 2 would be i itself, and is the other one.

    Args:
        classes: Number of classes, at least 2.
        images: Pictures of each, an even number.

    Returns:
        int64 `[classes * images, 2]`, rows of the group, the order within a pair as above; and int64 of as many, 1 for
        pairs of the same class, 0 for others.

    Source: Sun et al. 2020; the pairs as in the authors' code, which has 4 x 4 pictures.
    """
    pairs, same = [], []
    for first in range(0, images, 4):
        block = [(0, 1, 0), (2, 1, 0), (0, 3, 2), (2, 3, 1)] if first + 4 <= images else [(0, 1, 0), (0, 1, 1)]
        for member, other, shift in block:
            shift = shift % classes or min(shift, 1)
            for number in range(classes):
                pairs.append((number * images + first + member, (number - shift) % classes * images + first + other))
                same.append(int(shift == 0))
    return torch.tensor(pairs, device="cpu"), torch.tensor(same, device="cpu")


def match_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Return the cross-entropy of pairs, a mean over them as a scalar, at least fp32.

    Args:
        logits: `[P, 2]`, of "another class" and "the same class".
        same: int64 `[P]`, 1 for the same.

    Source: Sun et al. 2020; in the authors' code not a margin of distances, but this.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, same.to(exact.device, non_blocking=True))
