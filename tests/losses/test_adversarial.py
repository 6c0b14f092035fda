"""The adversarial losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from i2i_dist.losses.adversarial import Kind, discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1

REAL = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) * 2
FAKE = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2


def test_least_squares() -> None:
    expected = F.mse_loss(REAL, torch.ones_like(REAL)) + F.mse_loss(FAKE, torch.zeros_like(FAKE))
    torch.testing.assert_close(discriminator_loss("lsgan", REAL, FAKE), expected)
    torch.testing.assert_close(generator_loss("lsgan", FAKE), F.mse_loss(FAKE, torch.ones_like(FAKE)))


def test_vanilla() -> None:
    bce = F.binary_cross_entropy_with_logits
    expected = bce(REAL, torch.ones_like(REAL)) + bce(FAKE, torch.zeros_like(FAKE))
    torch.testing.assert_close(discriminator_loss("vanilla", REAL, FAKE), expected)
    torch.testing.assert_close(generator_loss("vanilla", FAKE), bce(FAKE, torch.ones_like(FAKE)))


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    for kind in ("hinge", "hinge_standard"):
        assert discriminator_loss(kind, real, fake).item() == pytest.approx((0 + 1 + 2) / 3 + (0 + 1 + 2) / 3)
    assert generator_loss("hinge", real).item() == pytest.approx((0 + 1 + 2) / 3)
    assert generator_loss("hinge_standard", real).item() == pytest.approx(-1 / 3)


def test_wasserstein() -> None:
    torch.testing.assert_close(discriminator_loss("wgan", REAL, FAKE), -REAL.mean() + FAKE.mean())
    torch.testing.assert_close(generator_loss("wgan", FAKE), -FAKE.mean())


def test_clamped_generator_hinge_rests_once_all_logits_exceed_one() -> None:
    logits = torch.tensor([1.5, 3.0], requires_grad=True)
    loss = generator_loss("hinge", logits)
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()
    logits.grad = None
    generator_loss("hinge_standard", logits).backward()
    assert torch.equal(logits.grad, torch.tensor([-0.5, -0.5]))


@pytest.mark.parametrize("kind", ["lsgan", "vanilla", "hinge", "hinge_standard", "wgan"])
def test_losses_are_computed_in_fp32(kind: Kind) -> None:
    real, fake = REAL.bfloat16(), FAKE.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = discriminator_loss(kind, real, fake), generator_loss(kind, fake)
    exact = discriminator_loss(kind, real.float(), fake.float()), generator_loss(kind, fake.float())
    assert all(loss.dtype == torch.float32 and loss.dim() == 0 for loss in low)
    torch.testing.assert_close(low, exact)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'ragan' is not known; use one of lsgan, vanilla, hinge, hinge_standard, wgan"
    ):
        discriminator_loss("ragan", REAL, FAKE)
    with pytest.raises(ValueError, match="'ragan'"):
        generator_loss("ragan", FAKE)


def test_l1_is_a_mean_in_fp32() -> None:
    a, b = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    assert l1(a, b).dtype == torch.float32
    torch.testing.assert_close(l1(a, b), (a.float() - b).abs().mean())
    assert l1(a.double(), b).dtype == torch.float64
