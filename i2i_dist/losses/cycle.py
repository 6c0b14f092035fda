"""Distance between images, for the cycle and the identity terms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference of `a` and `b` (same shape) as a scalar, at least fp32.

    Source: Zhu et al. 2017, equation 2 (cycle) and section 5.2 (identity), as a mean over all elements.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return F.l1_loss(a.to(dtype), b.to(dtype))
