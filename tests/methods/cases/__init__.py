"""What each method brings to the tests that all methods have to pass: one line here, one module beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import Optimizer

from tests.methods.cases import bicyclegan, cut, cyclegan, dclgan, opgan, pix2pix, simdcl, ugatit


class Case(NamedTuple):
    """One method's share.

    Attributes:
        small: Hyperparameters of a tiny version; the rest is the default preset.
        step: `step(method, batch, number, optimizers)`: update `number` as a plain PyTorch loop, one optimizer a side,
            in the order of the released code and with every pass on its own. The batch is the whole one, in float64.
        scale: What initial weights are multiplied by where a few steps have to go somewhere: 10 for those that start
            with a standard deviation of 0.02. Too much, and every step multiplies what rounding has left.
    """

    small: dict[str, Any]
    step: Callable[[Any, Any, int, dict[str, Optimizer]], None]
    scale: float = 10.0


CASES = {
    "bicyclegan": Case(bicyclegan.SMALL, bicyclegan.step),
    "cut": Case(cut.SMALL, cut.step),
    "cyclegan": Case(cyclegan.SMALL, cyclegan.step),
    "dclgan": Case(dclgan.SMALL, dclgan.step),
    "opgan": Case(opgan.SMALL, opgan.step),
    "pix2pix": Case(pix2pix.SMALL, pix2pix.step),
    "simdcl": Case(simdcl.SMALL, simdcl.step),
    "ugatit": Case(ugatit.SMALL, ugatit.step, scale=1.0),
}
