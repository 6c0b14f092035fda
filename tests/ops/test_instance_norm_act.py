"""Instance norm keeps its digits, whichever implementation runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from i2i_dist.ops import instance_norm_act
from tests.needs import DEVICES

MODES = ["auto", "reference"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_instance_norm_of_bf16_is_exact_up_to_the_rounding_of_its_output(
    mode: str, monkeypatch: pytest.MonkeyPatch, mean: float, autocast: bool, device: str
) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", mode)
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 48, 48) + mean).bfloat16()
    upstream = torch.randn(2, 16, 48, 48).bfloat16()
    exact = x.double().requires_grad_()
    expected = F.instance_norm(exact)
    expected.backward(upstream.double())
    low = x.to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        result = instance_norm_act(low)
    result.backward(upstream.to(device))
    assert result.dtype == torch.bfloat16 and low.grad is not None and exact.grad is not None
    half_ulp = 2.0**-8
    torch.testing.assert_close(result.cpu().double(), expected, rtol=1.01 * half_ulp, atol=2e-4)
    error = (low.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert error < half_ulp / 2  # rounding to nearest is uniform in half an ulp; 0.42 of it in the mean square


@pytest.mark.parametrize("mode", MODES)
def test_instance_norm_of_fp32_with_a_large_mean(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", mode)
    x = torch.randn(2, 8, 64, 64) + 1000
    torch.testing.assert_close(instance_norm_act(x).double(), F.instance_norm(x.double()), rtol=0, atol=3e-4)
    assert instance_norm_act(x.double()).dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_instance_norm_can_be_differentiated_twice(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", mode)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(instance_norm_act, (x,))
    assert torch.autograd.gradgradcheck(instance_norm_act, (x,))
