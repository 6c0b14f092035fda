"""What each method brings to the tests that all methods have to pass: one line here, one module beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from tests.methods.cases import bicyclegan, cut, cyclegan, dclgan, pix2pix, simdcl


class Case(NamedTuple):
    """One method's share.

    Attributes:
        small: Hyperparameters of a tiny version; the rest is the default preset.
        step: `step(method, a, b, number, optimizers)`: update `number` as a plain PyTorch loop, one optimizer a side,
            in the order of the released code and with every pass on its own. Images are float64 [N, 3, H, W].
    """

    small: dict[str, Any]
    step: Callable[[Any, Tensor, Tensor, int, dict[str, Optimizer]], None]


CASES = {
    "bicyclegan": Case(bicyclegan.SMALL, bicyclegan.step),
    "cut": Case(cut.SMALL, cut.step),
    "cyclegan": Case(cyclegan.SMALL, cyclegan.step),
    "dclgan": Case(dclgan.SMALL, dclgan.step),
    "pix2pix": Case(pix2pix.SMALL, pix2pix.step),
    "simdcl": Case(simdcl.SMALL, simdcl.step),
}
