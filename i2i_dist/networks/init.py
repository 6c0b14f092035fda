"""How network weights start."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from i2i_dist.networks.batch_norm import BatchNorm
from i2i_dist.networks.spectral_norm import SpectralLayer

Kind = Literal["xavier", "normal", "uniform"]


def initialise(module: nn.Module, kind: Kind, *, gain: float = 0.02, generator: torch.Generator) -> None:
    """Set every convolution, linear and batch norm layer of `module` in place, in the order of `modules()`.

    Layers with spectral norm get new unit vectors besides.

    Args:
        module: The network; its parameters lie on the device of `generator`.
        kind: `"xavier"`: normal with standard deviation gain * sqrt(2 / (fan_in + fan_out)) (CUT, DCLGAN);
            `"normal"`: normal with standard deviation `gain` (CycleGAN, pix2pix); `"uniform"`: PyTorch's default,
            weights and biases between -1 / sqrt(fan_in) and 1 / sqrt(fan_in) (U-GAT-IT).
        gain: The scale; batch norm weights are drawn from N(1, gain^2). Biases become 0, unless `kind` is `"uniform"`.
        generator: Where the numbers come from.

    Raises:
        ValueError: For another `kind`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"initialisation {kind!r} is not known; use 'xavier', 'normal' or 'uniform'.")
    for layer in module.modules():
        if isinstance(layer, (_ConvNd, nn.Linear)):
            bound = 1 / math.sqrt(layer.weight[0].numel())  # kaiming_uniform_ with a = sqrt(5) comes to the same
            if kind == "xavier":
                nn.init.xavier_normal_(layer.weight, gain, generator=generator)
            elif kind == "normal":
                nn.init.normal_(layer.weight, 0.0, gain, generator=generator)
            else:
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None and kind == "uniform":
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
            elif layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, BatchNorm):
            nn.init.normal_(layer.weight, 1.0, gain, generator=generator)
            nn.init.zeros_(layer.bias)
        if isinstance(layer, SpectralLayer):
            layer.draw_vectors(generator)
