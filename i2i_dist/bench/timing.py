"""Times forms of a computation in turns, counts what they start, and measures what the device can do at most."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from i2i_dist.bench.kernel_cases import Form, Precision

MIN_ROUNDS, MAX_ROUNDS = 3, 200
GRAPH_WARM_UPS = 3


class Sample(NamedTuple):
    """Milliseconds of one run."""

    forward: float
    backward: float


class Spread(NamedTuple):
    """Median and quantiles of milliseconds."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarise samples."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return Spread(*quantiles.tolist())._asdict()


def run_once(form: Form, grad: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute the output and, unless the form stands for the gradient alone, the gradients of the leaves."""
    output = form.function(*form.leaves)
    if form.gradient is not None:
        return output, ()
    return output, torch.autograd.grad(output, form.leaves, grad)


def compiled(form: Form) -> Form:
    """Return the form through torch.compile if it asks for that."""
    if form.compiled is None:
        return form
    return form._replace(function=torch.compile(form.function, mode=form.compiled, dynamic=False, fullgraph=True))


@contextlib.contextmanager
def math_mode(precision: Precision) -> Iterator[None]:
    """Let fp32 products be TF32 for the precision of that name, and exact for all others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Clock:
    """Times single runs on a device; on CUDA the L2 cache is overwritten before each and the device is idle then."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, form: Form, grad: Tensor | None) -> Sample:
        """Time one run of a form."""
        self._settle()
        marks = [self._mark()]
        output = form.function(*form.leaves)
        marks.append(self._mark())
        gradients = None if form.gradient is not None else torch.autograd.grad(output, form.leaves, grad)
        marks.append(self._mark())
        del output, gradients
        return Sample(self._between(*marks[:2]), self._between(*marks[1:]))

    def time_call(self, call: Callable[[], object]) -> float:
        """Time one call."""
        self._settle()
        start = self._mark()
        call()
        return self._between(start, self._mark())

    def _settle(self) -> None:
        if self._cuda:
            self._flush.zero_()
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return float(end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))


def take_turns(calls: Sequence[Callable[[], None]], seconds: float) -> None:
    """Make all calls in turn, again and again for about `seconds`, at least three times.

    Each round has an order of its own: the caches are as the call before has left them, and nobody shall always follow
    the same one.
    """
    start, rounds, order = time.perf_counter(), 0, random.Random(0)
    while rounds < MIN_ROUNDS or (time.perf_counter() - start < seconds and rounds < MAX_ROUNDS):
        for call in order.sample(calls, len(calls)):
            call()
        rounds += 1


def capture(form: Form, grad: Tensor | None) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the form's forward and backward."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UPS):
            run_once(form, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_once(form, grad)
    return graph.replay


def count_launches(form: Form, grad: Tensor | None) -> int | None:
    """Count kernels, copies and fills on CUDA, dispatched ops on a CPU; None for compiled loops that no one counts."""
    device = form.leaves[0].device
    if device.type != "cuda" and form.compiled is not None:
        return None
    return count_started(lambda: run_once(form, grad), device, views=True)


def count_started(call: Callable[[], object], device: torch.device, *, views: bool = False) -> int:
    """Count what a call starts: kernels, copies and fills on CUDA; on a CPU the ATen operators that it dispatches.

    Args:
        call: What is called once.
        device: Where it computes.
        views: On a CPU, whether operators that only look at a tensor in another way count too.
    """
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(str(event.device_type).endswith("CUDA") for event in profile.events() or ())
    with _Counter(views) as counter:
        call()
    return int(counter.ops)


class _Counter(TorchDispatchMode):
    def __init__(self, views: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops, self._views = 0, views

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += self._views or not function.is_view
        return function(*args, **(kwargs or {}))


def copy_rate(device: torch.device, runs: int = 9) -> float:
    """Return the bytes per second, read and written, of the fastest of some copies far larger than the caches."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    milliseconds = min(clock.time_call(lambda: target.copy_(source)) for _ in range(runs))
    return 2 * source.numel() * source.element_size() / milliseconds * 1e3


def product_rate(device: torch.device, precision: Precision, runs: int = 5) -> float:
    """Return the operations per second of the fastest of some large square matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, side, side).to(device, dtype)
    clock = Clock(device)
    with math_mode(precision):
        milliseconds = min(clock.time_call(lambda: left @ right) for _ in range(runs))
    return 2 * side**3 / milliseconds * 1e3
