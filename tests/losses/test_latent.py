"""The divergence of codes from N(0, 1)."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from i2i_dist.losses.latent import kl_to_standard_normal


def test_it_is_torchs_divergence_summed_over_numbers_and_averaged_over_pictures() -> None:
    draw = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 5, 8, generator=draw, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)
    assert float(kl_to_standard_normal(torch.zeros(3, 8), torch.zeros(3, 8))) == 0.0


def test_it_does_not_grow_with_the_batch_and_is_at_least_fp32() -> None:
    mean, logvar = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    one, many = kl_to_standard_normal(mean, logvar), kl_to_standard_normal(mean.repeat(7, 1), logvar.repeat(7, 1))
    torch.testing.assert_close(one, many)
    low = kl_to_standard_normal(mean.bfloat16(), logvar.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, one, rtol=0.05, atol=0)
