"""How network weights start."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from i2i_dist.networks.batch_norm import BatchNorm


def initialise(
    module: nn.Module, kind: Literal["xavier", "normal"], *, gain: float = 0.02, generator: torch.Generator
) -> None:
    """Set every convolution, linear and batch norm layer of `module` in place, in the order of `modules()`.

    Args:
        module: The network; its parameters lie on the device of `generator`.
        kind: `"xavier"`: normal with standard deviation gain * sqrt(2 / (fan_in + fan_out)) (CUT, DCLGAN);
            `"normal"`: normal with standard deviation `gain` (CycleGAN, pix2pix).
        gain: The scale; batch norm weights are drawn from N(1, gain^2). Biases become 0.
        generator: Where the numbers come from.

    Raises:
        ValueError: For another `kind`.
    """
    if kind not in ("xavier", "normal"):
        raise ValueError(f"initialisation {kind!r} is not known; use 'xavier' or 'normal'.")
    for layer in module.modules():
        if isinstance(layer, (_ConvNd, nn.Linear)):
            if kind == "xavier":
                nn.init.xavier_normal_(layer.weight, gain, generator=generator)
            else:
                nn.init.normal_(layer.weight, 0.0, gain, generator=generator)
        elif isinstance(layer, BatchNorm):
            nn.init.normal_(layer.weight, 1.0, gain, generator=generator)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
