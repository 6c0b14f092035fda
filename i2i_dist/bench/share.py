"""What share of a training step the native ops take, before and after: `bench.py share`.

Every call of an op in the step is put between two identities of the autograd graph. Their forwards note when the op's
forward begins and ends, their backwards when its backward does: autograd runs an op's nodes together, those made last
first. The same step is taken in turn with the plain definitions (I2I_DIST_OPS=reference) and with the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist import ops
from i2i_dist.bench.facts import build_facts, json_path
from i2i_dist.bench.forms import Form, Size, build_ours, random_batch
from i2i_dist.bench.kernels import why_not_native
from i2i_dist.bench.tables import share_table
from i2i_dist.bench.timing import spread
from i2i_dist.networks.blocks import ResidualBlock

OPS = ("patch_nce_losses", "patch_nce_loss", "adalin", "iln", "instance_norm_act", "patch_gather")
MODES = ("reference", "native")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench.py share`."""
    parser.add_argument("--size", type=int, default=256, help="height and width of the images (default: 256)")
    parser.add_argument("--width", type=int, default=64, help="channels of the networks (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each kind (default: 3)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="also write everything to this file, or to the device's own in this folder",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and return the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = why_not_native({"patch_nce", "adalin", "instance_norm_act", "patch_gather"}, device.type)
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return 2
    size = Size(options.size, 1, options.width)
    steps = [
        measure("DCLGAN", _dclgan_step(size, device), device, options.rounds),
        measure("U-GAT-IT's generator", _generator_step(size, device), device, options.rounds),
    ]
    result = {
        "commands": ["python launchers/bench.py " + shlex.join(sys.argv[1:])],
        "kind": device.type,
        "machine": build_facts(device),
        "setting": size._asdict() | {"rounds": options.rounds},
        "steps": steps,
    }
    print(share_table(result))
    if options.json is not None:
        json_path(options.json, device, ".share.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(name: str, step: Callable[[], None], device: torch.device, rounds: int) -> dict[str, Any]:
    """Take the step in turn with both implementations, after a warm-up of each."""
    totals: dict[str, list[float]] = {mode: [] for mode in MODES}
    spans: dict[str, _Spans] = {mode: _Spans(device) for mode in MODES}
    before = os.environ.get("I2I_DIST_OPS")
    try:
        for number in range(rounds + 1):
            for mode in MODES:
                os.environ["I2I_DIST_OPS"] = mode
                with spans[mode].of_the_ops():
                    start = _mark(device)
                    step()
                    total = _between(start, _mark(device))
                print(f"{name}, {mode}: {total:.0f} ms", file=sys.stderr, flush=True)
                if number == 0:
                    spans[mode].clear()
                else:
                    totals[mode].append(total)
    finally:
        os.environ.pop("I2I_DIST_OPS") if before is None else os.environ.update(I2I_DIST_OPS=before)
    return {"name": name} | {mode: {"total": spread(totals[mode]), "ops": spans[mode].sums(rounds)} for mode in MODES}


class _Spans:
    """Collects when forwards and backwards of ops begin and end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls: list[tuple[str, dict[str, Any]]] = []  # op, and the marks of one call by name

    def clear(self) -> None:
        """Forget what was collected."""
        self._calls.clear()

    @contextlib.contextmanager
    def of_the_ops(self) -> Iterator[None]:
        """Watch the ops wherever a module of the package calls them."""
        modules = [module for name, module in list(sys.modules.items()) if name.startswith("i2i_dist.")]
        modules = [module for module in modules if not module.__name__.startswith("i2i_dist.ops.")]
        originals = {name: getattr(ops, name) for name in OPS}
        places = [(module, name) for module in modules for name in OPS if module.__dict__.get(name) is originals[name]]
        for module, name in places:
            setattr(module, name, functools.partial(self._watched, name, originals[name]))
        try:
            yield
        finally:
            for module, name in places:
                setattr(module, name, originals[name])

    def sums(self, steps: int) -> dict[str, dict[str, float]]:
        """Return calls and milliseconds for each op in one step."""
        found: dict[str, dict[str, float]] = {}
        for op, marks in self._calls:
            row = found.setdefault(op, {"calls": 0.0, "forward": 0.0, "backward": 0.0})
            row["calls"] += 1 / steps
            row["forward"] += _between(marks["enter"], marks["leave"]) / steps
            if "backward_enter" in marks:
                row["backward"] += _between(marks["backward_enter"], marks["backward_leave"]) / steps
        return {op: row | {"calls": round(row["calls"], 6)} for op, row in found.items()}

    def _watched(self, name: str, op: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        marks: dict[str, Any] = {}
        self._calls.append((name, marks))

        def note(key: str) -> None:
            marks[key] = _mark(self._device)

        given = _tensors([*arguments, *named.values()])
        inside = iter(_identity(lambda: note("enter"), lambda: note("backward_leave"), given))
        arguments = tuple(_replace(argument, inside) for argument in arguments)
        named = {key: _replace(value, inside) for key, value in named.items()}
        result = op(*arguments, **named)
        outputs = result if isinstance(result, tuple) else (result,)
        outside = _identity(lambda: note("leave"), lambda: note("backward_enter"), outputs)
        return tuple(outside) if isinstance(result, tuple) else outside[0]


def _identity(forward: Callable[[], None], backward: Callable[[], None], tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(_Identity.apply(forward, backward, *tensors))  # type: ignore[no-untyped-call]


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, forward: Callable[[], None], backward: Callable[[], None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        forward()
        ctx.note = backward
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.note()
        return None, None, *grads


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _replace(value: Any, inside: Iterator[Tensor]) -> Any:
    """Return `value` with its tensors taken from `inside`, in the order of `_tensors`."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return next(inside)
    return [_replace(item, inside) for item in value] if isinstance(value, (list, tuple)) else value


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start) * 1e3
    end.synchronize()
    return float(start.elapsed_time(end))


def _dclgan_step(size: Size, device: torch.device) -> Callable[[], None]:
    take, _ = build_ours(Form("ours"), size, device)
    numbers = iter(range(sys.maxsize))

    def step() -> None:
        number = next(numbers)
        take(random_batch(size.batch, size.size, number, device), number)

    return step


def _generator_step(size: Size, device: torch.device) -> Callable[[], None]:
    network = AdaLINGenerator(size.width).to(device)
    image = random_batch(size.batch, size.size, 0, device).a

    def step() -> None:
        network.zero_grad()
        F.l1_loss(network(image), image).backward()

    return step


class AdaLINGenerator(nn.Module):
    """U-GAT-IT's generator without its attention; gamma and beta come from a perceptron of pooled features.

    Source: Kim et al. 2020, the light form: 4 residual blocks, 4 with two AdaLIN each, 2 upsampling stages with ILN.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        w, v, u = width, 2 * width, 4 * width
        self.down = nn.ModuleList([nn.Conv2d(3, w, 7), nn.Conv2d(w, v, 3, stride=2), nn.Conv2d(v, u, 3, stride=2)])
        self.blocks = nn.ModuleList(ResidualBlock(u) for _ in range(4))
        self.style = nn.Sequential(nn.Linear(u, u, bias=False), nn.ReLU(), nn.Linear(u, 2 * u, bias=False))
        self.adaptive = nn.ModuleList(nn.Conv2d(u, u, 3, bias=False) for _ in range(8))
        self.up = nn.ModuleList([nn.Conv2d(u, v, 3, bias=False), nn.Conv2d(v, w, 3, bias=False)])
        self.rho = nn.ParameterList(nn.Parameter(torch.full((u,), 0.9)) for _ in range(8))
        # gamma, beta and rho of the two ILN.
        self.affine = nn.ParameterList(
            nn.Parameter(torch.tensor([1.0, 0.0, 0.0])[:, None].repeat(1, c)) for c in (v, w)
        )
        self.to_image = nn.Conv2d(w, 3, 7, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """Translate `image` `[N, 3, H, W]`."""
        x = image
        for pad, conv in zip((3, 1, 1), self.down, strict=True):
            x = ops.instance_norm_act(conv(_reflect(x, pad)), activation="relu")
        for block in self.blocks:
            x = block(x)
        gamma, beta = self.style(x.mean((2, 3))).chunk(2, dim=1)
        for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
            y = ops.adalin(self.adaptive[first](_reflect(x, 1)), gamma, beta, self.rho[first], activation="relu")
            x = ops.adalin(self.adaptive[second](_reflect(y, 1)), gamma, beta, self.rho[second], residual=x)
        for conv, affine in zip(self.up, self.affine, strict=True):
            doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = ops.iln(conv(_reflect(doubled, 1)), affine[0], affine[1], affine[2], activation="relu")
        translated: Tensor = self.to_image(_reflect(x, 3))
        return translated.tanh()


def _reflect(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (width, width, width, width), mode="reflect")
