"""Layers with spectral norm against PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from i2i_dist.networks.spectral_norm import SpectralConv2d


def pair() -> tuple[SpectralConv2d, nn.Module]:
    """The same layer twice, in fp64 and with the same vectors."""
    ours = SpectralConv2d(3, 5, 4, stride=2, padding=1).double()
    theirs: Any = nn.utils.spectral_norm(nn.Conv2d(3, 5, 4, stride=2, padding=1).double())
    with torch.no_grad():
        for mine, other in ((ours.weight, theirs.weight_orig), (ours.bias, theirs.bias)):
            mine.copy_(other)
        ours.u.copy_(theirs.weight_u)
        ours.v.copy_(theirs.weight_v)
    return ours, theirs


def test_values_gradients_and_vectors_are_those_of_pytorchs_own() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for training in (True, True, False, True):
        ours.train(training), theirs.train(training)
        began = ours.u.clone()
        mine, other = ours(x) + ours(-x).square(), theirs(x) + theirs(-x).square()  # two passes before the backward
        torch.testing.assert_close(mine, other)
        ours.zero_grad(), theirs.zero_grad()
        mine.square().sum().backward(), other.square().sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight_orig.grad)
        torch.testing.assert_close((ours.u, ours.v), (theirs.weight_u, theirs.weight_v))
        assert torch.equal(began, ours.u) != training


class _Products(TorchDispatchMode):
    """Counts products of a matrix and a vector."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.mv.default
        return function(*args, **(kwargs or {}))


def test_the_weight_is_multiplied_no_more_often_than_needed() -> None:
    """The power iteration's second product is the one that sigma is made of; in `eval()` there is that alone."""
    layer = SpectralConv2d(3, 5, 4)
    for training, needed in ((True, 2), (False, 1)):
        layer.train(training)
        with _Products() as products:
            layer.normalised_weight()
        assert products.count == needed
