"""A side of the game without an engine, so that tests can run updates in their own process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from i2i_dist.method import SIDES, ParameterGroup


class PlainSide:
    """What `step.update` asks of a SideEngine, on one rank, with Adam; numbers that are not finite are let through."""

    def __init__(self, module: nn.Module, groups: Sequence[ParameterGroup], factor: float = 1.0) -> None:
        self.module, self.steps = module, 0
        self._watch = SimpleNamespace(take=lambda: torch.zeros(()))
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(group.parameters), "lr": rate, "base_lr": rate, "betas": group.betas}
                | {"weight_decay": group.weight_decay, "bounds": group.bounds, "constant": group.constant}
                for group, rate in ((group, factor * group.lr) for group in groups)
            ],
            fused=True,
        )

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        self.module.requires_grad_(False)
        yield self.module
        self.module.requires_grad_(True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, *, skip: bool) -> None:
        assert not skip
        self.optimizer.step()
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"] if group["bounds"] else ():
                    parameter.clamp_(*group["bounds"])
        self.optimizer.zero_grad()
        self.steps += 1

    def set_learning_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (group["constant"] + (1.0 - group["constant"]) * factor)


def plain_sides(method: Any, factor: float = 1.0) -> Any:
    """Return both sides of a method; `factor` multiplies its learning rates."""
    groups = method.parameter_groups()
    return {side: PlainSide(getattr(method, side), groups[side], factor) for side in SIDES}
