"""Layers whose weight is divided by its largest singular value, which a power iteration follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.ops.precision import outside_autocast

_EPS = 1e-12


class SpectralLayer(nn.Module):
    """Mixed into a layer: `weight`, as a matrix of one row for each output, is used divided by sigma = u . W v.

    In training every forward moves the buffers `u` and `v` by one power iteration before it uses them; they are
    constants to the gradient, which reaches `weight` through sigma too. In `eval()` they stay. The parameter is the raw
    weight, and the division is fp32 or better under autocast too.

    `u` and `v` depend on the weight alone, so they are finite as long as it is, and ranks that forward equally often
    hold the same. An update that is dropped leaves them one iteration further on the same weight: nearer to where they
    go anyway.

    Source: Miyato et al. 2018, algorithm 1.
    """

    weight: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("u", torch.empty(rows))
        self.register_buffer("v", torch.empty(columns))
        self.draw_vectors(None)

    @torch.no_grad()
    def draw_vectors(self, generator: torch.Generator | None) -> None:
        """Set `u` and `v` to random unit vectors drawn from `generator`, or from torch's own."""
        for vector in (self.u, self.v):
            F.normalize(vector.normal_(generator=generator), dim=0, eps=_EPS, out=vector)

    def normalised_weight(self) -> Tensor:
        """Return `weight / sigma`, after one power iteration if in training; for the layer's own forward."""
        with outside_autocast(self.weight):
            matrix = self.weight.flatten(1)
            if self.training:
                with torch.no_grad():
                    F.normalize(torch.mv(matrix.T, self.u), dim=0, eps=_EPS, out=self.v)
            # Copies, since the next forward overwrites the vectors before this one's backward.
            stretched = torch.mv(matrix, self.v.clone())
            if self.training:
                with torch.no_grad():
                    F.normalize(stretched, dim=0, eps=_EPS, out=self.u)
            sigma = torch.dot(self.u.clone(), stretched)
            return self.weight / sigma


class SpectralConv2d(SpectralLayer, nn.Conv2d):
    """A convolution with a normalised weight; arguments as of `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` `[N, C, H, W]`."""
        convolved: Tensor = self._conv_forward(x, self.normalised_weight(), self.bias)
        return convolved


def vectors(module: nn.Module) -> Iterator[Tensor]:
    """Yield `u` and `v` of every layer of `module` that is normalised."""
    for layer in module.modules():
        if isinstance(layer, SpectralLayer):
            yield layer.u
            yield layer.v
