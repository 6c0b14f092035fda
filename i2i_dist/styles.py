"""Codes of methods with many translations for an image (`method.Styled`): drawn, and on the way between two of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from i2i_dist.draws import Draws


def drawn(seed: int, count: int, size: int) -> Tensor:
    """Draw codes from N(0, 1), float32 [count, size]; each depends on the seed and its number alone."""
    return Draws(seed, 0).normal("style", torch.arange(count), size)


def between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Return codes on the way from one to another, both included.

    Codes of N(0, 1) lie near a sphere, and halfway along the straight line between two of them is a code shorter than
    any that the generator was trained with. So the direction turns evenly (slerp), as in BicycleGAN's own videos, and
    the length changes evenly with it. Where no direction is nearer than another, as between opposite codes, the way is
    the straight line.

    Args:
        first: Code [size].
        last: Code [size].
        steps: How many codes, at least 2.

    Returns:
        float32 [steps, size].
    """
    place = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)[:, None]
    ends = torch.stack([first, last]).double()
    straight = torch.lerp(ends[0], ends[1], place)
    lengths = ends.norm(dim=1)
    unit = ends / lengths[:, None]
    angle = torch.arccos((unit[0] @ unit[1]).clamp(-1.0, 1.0))
    if not float(torch.sin(angle)) > 1e-6:  # also where a code is 0, and the angle is no number
        return straight.float()
    turned: Tensor = (torch.sin((1 - place) * angle) * unit[0] + torch.sin(place * angle) * unit[1]) / torch.sin(angle)
    length: Tensor = torch.lerp(lengths[0], lengths[1], place)
    return (turned * length).float()


def diversity(pictures: Sequence[npt.NDArray[np.uint8]]) -> float:
    """Return the mean absolute difference between pictures of one input, in [0, 255], over all pairs and all values.

    Args:
        pictures: At least 2, uint8 [H, W, 3] of the same size.
    """
    count = len(pictures)
    # Sorted, a value is the greater one in as many pairs as there are values before it, and the smaller in the others.
    ordered = np.sort(np.stack(pictures), axis=0)
    total = sum((2 * rank - count + 1) * int(layer.sum(dtype=np.int64)) for rank, layer in enumerate(ordered))
    return total / (count * (count - 1) / 2) / pictures[0].size
