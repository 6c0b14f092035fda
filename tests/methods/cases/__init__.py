"""What each method brings to the tests that all methods have to pass: one line here, one module beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import Optimizer

from tests.methods.cases import bicyclegan, cut, cyclegan, dclgan, matchgan, opgan, pix2pix, simdcl, stargan, ugatit
from tests.methods.cases.common import GLOBAL_BATCH


class Case(NamedTuple):
    """One method's share.

    Attributes:
        small: Hyperparameters of a tiny version; the rest is the default preset.
        step: `step(method, batch, number, optimizers)`: update `number` as a plain PyTorch loop, one optimizer a side,
            in the order of the released code and with every pass on its own. The batch is the whole one, in float64, of
            the method's kind, and of a method with several streams from the one whose turn the update is.
        scale: What initial weights are multiplied by where a few steps have to go somewhere: 10 for those that start
            with a standard deviation of 0.02. Too much, and every step multiplies what rounding has left.
        batch: Samples of an update, over two ranks.
    """

    small: dict[str, Any]
    step: Callable[[Any, Any, int, dict[str, Optimizer]], None]
    scale: float = 10.0
    batch: int = GLOBAL_BATCH


CASES = {
    "bicyclegan": Case(bicyclegan.SMALL, bicyclegan.step),
    "cut": Case(cut.SMALL, cut.step),
    "cyclegan": Case(cyclegan.SMALL, cyclegan.step),
    "dclgan": Case(dclgan.SMALL, dclgan.step),
    "matchgan": Case(matchgan.SMALL, matchgan.step, scale=1.0, batch=matchgan.BATCH),
    "opgan": Case(opgan.SMALL, opgan.step),
    "pix2pix": Case(pix2pix.SMALL, pix2pix.step),
    "simdcl": Case(simdcl.SMALL, simdcl.step),
    "stargan": Case(stargan.SMALL, stargan.step, scale=1.0),
    "ugatit": Case(ugatit.SMALL, ugatit.step, scale=1.0),
}
