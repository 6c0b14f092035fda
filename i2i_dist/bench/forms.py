"""The forms of one training step that are measured, each in a process of its own that steps when it is told."""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from i2i_dist.bench.eager_dclgan import EagerDCLGAN
from i2i_dist.bench.eager_ugatit import EagerUGATIT
from i2i_dist.bench.facts import machine_facts
from i2i_dist.bench.memory import limit_memory
from i2i_dist.bench.timing import count_started
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.method import Method
from i2i_dist.methods import resolve

SEED = 0


class Size(NamedTuple):
    """How large a step is: `batch` images of size x size per domain, networks of `width` channels."""

    size: int
    batch: int
    width: int


class Form(NamedTuple):
    """One way to take a method's step."""

    name: Literal["ours", "eager"]
    precision: Literal["fp32", "bf16"] = "fp32"
    method: str = "dclgan"  # a key of SUBJECTS


class Request(NamedTuple):
    """What a form's process is asked for: a step with this many images of each domain, timed or counted."""

    images: int
    counted: bool = False


class Reply(NamedTuple):
    """What a form's process answers: the step's seconds and losses, or what it started, or why there is nothing."""

    seconds: float = 0.0
    losses: dict[str, float] = {}  # noqa: RUF012 - never changed
    peak_bytes: int = 0  # since before the networks were built
    launches: int = 0  # as `timing.count_started` counts them
    facts: dict[str, str | int] = {}  # noqa: RUF012
    failure: str | None = None


# Images and number of the update -> its losses.
Step = Callable[[Batch, int], dict[str, float]]


class EagerForm(Protocol):
    """A method's networks and optimizers as the released code has them."""

    def step(self, a: Tensor, b: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Train once on images `[N, 3, H, W]` of both domains and return the loss terms under the method's names."""


class Subject(NamedTuple):
    """A method whose step is measured.

    Attributes:
        title: What it is called.
        section: Its configuration at a size.
        eager: Builds the eager form, on a device, from the weights of the method.
    """

    title: str
    section: Callable[[Size], dict[str, Any]]
    eager: Callable[[Any, torch.device], EagerForm]


def _dclgan(size: Size) -> dict[str, Any]:
    # As the eager form has it; at batch 1 these are the same patches as an image's own.
    negatives = {"negatives": "global_batch"} if size.batch > 1 else {}
    return {"width": size.width, "critic_width": size.width, **negatives}


def _ugatit(size: Size) -> dict[str, Any]:
    return {"width": size.width, "critic_width": size.width, "light": True}


SUBJECTS = {
    "dclgan": Subject("DCLGAN", _dclgan, EagerDCLGAN),
    "ugatit": Subject("U-GAT-IT light", _ugatit, EagerUGATIT),
}


def serve(pipe: Connection, form: Form, size: Size, device_name: str) -> None:
    """Build the form, then take a step for every request, until there is None; anything raised is answered too."""
    try:
        device = torch.device(device_name)
        limit_memory()
        torch.backends.cudnn.benchmark = True  # as the released code sets it
        build = build_ours if form.name == "ours" else _eager
        step, baseline = build(form, size, device)
        pipe.send(Reply(facts=machine_facts(device)))
        number = 0
        while (request := pipe.recv()) is not None:
            batch = random_batch(request.images, size.size, number, device)
            _wait(device)
            if request.counted:
                pipe.send(Reply(launches=count_started(functools.partial(step, batch, number), device)))
            else:
                start = time.perf_counter()
                losses = step(batch, number)
                _wait(device)
                seconds = time.perf_counter() - start
                pipe.send(Reply(seconds, losses, _peak_bytes(device) - baseline))
            number += 1
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        pipe.send(Reply(failure=f"{type(error).__name__}: {first_line[:200]}"))


def build_ours(form: Form, size: Size, device: torch.device) -> tuple[Step, int]:
    """Return our step, and the peak of memory before its networks were built."""
    from i2i_dist import engines, step  # here, so that the other form's process does not load deepspeed
    from i2i_dist.distributed import adopt_environment
    from i2i_dist.pool import ImagePools

    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        os.environ.pop(name, None)  # one rank, whatever this process was started by
    engines.start(adopt_environment(os.environ), timeout_seconds=600)
    baseline = _peak_bytes(device)
    method = _method(form, size)
    layout = engines.Layout(size.batch, 1, 1, precision=form.precision)
    sides: step.Sides = {
        side: engines.SideEngine(getattr(method, side), groups, layout, device)
        for side, groups in method.parameter_groups().items()
    }
    pools = ImagePools(method.fakes, method.pool_size, SEED)

    def take(batch: Batch, number: int) -> dict[str, float]:
        done = step.update(method, sides, [batch], pools, seed=SEED, number=number, images_seen=0)
        return {name: float(loss) for name, loss in done.losses.items()}

    return take, baseline


def _eager(form: Form, size: Size, device: torch.device) -> tuple[Step, int]:
    baseline = _peak_bytes(device)
    eager = SUBJECTS[form.method].eager(_method(form, size), device)

    def take(batch: Batch, number: int) -> dict[str, float]:
        losses = eager.step(batch.a, batch.b, Draws(SEED, batch.update_position))
        return {name: float(loss) for name, loss in losses.items()}

    return take, baseline


def _method(form: Form, size: Size) -> Method:
    method, config = resolve({"name": form.method, **SUBJECTS[form.method].section(size)})
    return method(config, torch.Generator().manual_seed(SEED))


def random_batch(images: int, size: int, number: int, device: torch.device) -> Batch:
    """Draw images of both domains, the same for the same number."""
    draw = torch.Generator().manual_seed(number)
    a, b = (torch.rand(images, 3, size, size, generator=draw).mul_(2).sub_(1).to(device) for _ in range(2))
    return Batch(a, b, torch.arange(images), number)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
