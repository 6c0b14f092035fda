"""Distance of a code's distribution from the one that codes are drawn from."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) as a scalar, at least fp32.

    Args:
        mean: `[N, D]`.
        logvar: `[N, D]`, logarithms of the variances.

    Returns:
        The sum over the D numbers of a code, averaged over the N codes: it does not grow with the batch.

    Source: Kingma and Welling 2014, appendix B.
    """
    dtype = torch.promote_types(torch.promote_types(mean.dtype, logvar.dtype), torch.float32)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
