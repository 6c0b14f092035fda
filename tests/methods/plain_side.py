"""A side of the game without an engine: plain PyTorch, so that tests can run updates in their own process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from i2i_dist.engines import Precision
from i2i_dist.method import SIDES, ParameterGroup

ADAM = functools.partial(torch.optim.Adam, fused=True)


class PlainSide:
    """What `step.update` asks of a SideEngine, for updates of `pieces` batches; numbers not finite are let through.

    In bf16 the module's passes are under autocast, and nothing else is. Gradients are clipped to the norm `clipping`.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        factor: float = 1.0,
        *,
        optimizer: Callable[[Any], torch.optim.Optimizer] = ADAM,
        precision: Precision = "fp32",
        clipping: float = 0.0,
        pieces: int = 1,
    ) -> None:
        self.module, self.steps, self.precision, self.pieces = module, 0, precision, pieces
        self._watch = SimpleNamespace(take=lambda: torch.zeros(()))
        self.optimizer = optimizer(
            [
                {"params": list(group.parameters), "lr": rate, "base_lr": rate, "betas": group.betas}
                | {"weight_decay": group.weight_decay, "bounds": group.bounds, "constant": group.constant}
                for group, rate in ((group, factor * group.lr) for group in groups)
            ]
        )
        clip(self.optimizer, clipping)

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(*inputs)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Callable[..., Any]]:
        self.module.requires_grad_(False)
        yield self
        self.module.requires_grad_(True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.pieces).backward()

    def step(self, *, skip: bool) -> None:
        assert not skip
        self.optimizer.step()
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"] if group["bounds"] else ():
                    parameter.clamp_(*group["bounds"])
        self.optimizer.zero_grad(set_to_none=False)  # as under engines: momentum also moves what gets no gradient
        self.steps += 1

    def set_learning_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (group["constant"] + (1.0 - group["constant"]) * factor)


def clip(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Have the optimizer clip the gradients of all its parameters together to `norm` before each step; 0 for none."""

    def clip_now(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)

    if norm:
        optimizer.register_step_pre_hook(clip_now)


def plain_sides(method: Any, factor: float = 1.0, **options: Any) -> Any:
    """Return both sides of a method; `factor` multiplies its learning rates, and `options` are those of PlainSide."""
    groups = method.parameter_groups()
    return {side: PlainSide(getattr(method, side), groups[side], factor, **options) for side in SIDES}
