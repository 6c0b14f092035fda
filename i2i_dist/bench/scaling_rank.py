"""What one rank does for `bench.py scaling`: it takes updates with real engines and says how long they took."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import distributed

from i2i_dist import engines, step
from i2i_dist.bench.collectives import Noted, noted, settle
from i2i_dist.bench.facts import machine_facts
from i2i_dist.bench.memory import limit_memory
from i2i_dist.bench.timing import product_rate
from i2i_dist.bench.update_counts import cycle, made_batch
from i2i_dist.distributed import adopt_environment, barrier
from i2i_dist.engines import PERSISTENCE_THRESHOLD
from i2i_dist.method import Method, Side
from i2i_dist.methods import resolve
from i2i_dist.pool import ImagePools

# Updates before any is measured: ZeRO 3 learns the order of the modules in the first, and goes by it from the third on.
WARM_UPS, WARM_UPS_AT_3 = 1, 3
_PROBES = {4: 15, 16 * 2**20: 3}  # bytes of a collective, and how often it is tried


class Job(NamedTuple):
    """Updates to be measured, with one micro-batch on each rank.

    Attributes:
        section: The configuration's section `method`.
        size: Height and width of the pictures.
        batch: Samples on each rank.
        stages: The ZeRO stage of each side.
        precision: Of the engines.
        rounds: Updates that are timed; with 0 the collectives of one update are noted and nothing is timed.
        threshold: Elements up to which ZeRO 3 leaves a parameter whole.
    """

    section: Mapping[str, Any]
    size: int
    batch: int
    stages: Mapping[Side, int]
    precision: engines.Precision = "fp32"
    rounds: int = 0
    threshold: int = PERSISTENCE_THRESHOLD


class Done(NamedTuple):
    """What one rank has to say of a job.

    Attributes:
        seconds: Of each update, with nothing between its parts.
        noted: The collectives of each update that was taken apart.
        apart: Seconds of each of these.
        on_a_core: Seconds in each of these that this rank's thread was computing outside of collectives; with a GPU, of
            which each rank has one, all that are outside.
    """

    seconds: list[float]
    noted: list[list[Noted]]
    apart: list[float]
    on_a_core: list[float]


class Report(NamedTuple):
    """What one rank reports.

    Attributes:
        done: One for each job.
        probes: Seconds of collectives by kind and bytes, between ranks that do nothing else.
        product_rate: Operations per second of large matrix products, where the rank is alone.
        facts: Of the machine.
        failure: Why there is nothing else.
    """

    done: list[Done]
    probes: dict[str, dict[int, float]]
    product_rate: float
    facts: dict[str, str | int]
    failure: str | None = None


def serve(pipe: Connection, rank: int, world: int, port: int, jobs: Sequence[Job]) -> None:
    """Be one rank of a machine, do the jobs, send a `Report` and end the process."""
    try:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
            # Gradients that vanish leave subnormal moments, at which a processor, unlike a GPU, is many times slower.
            torch.set_flush_denormal(True)
        for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
            os.environ.pop(name, None)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        device = engines.start(adopt_environment(os.environ), timeout_seconds=600)
        limit_memory()
        torch.backends.cudnn.benchmark = True  # as train.py has it
        done = [_do(job, world, device) for job in jobs]
        rate = product_rate(device, jobs[0].precision) if world == 1 else 0.0
        report = Report(done, _probe(world, device), rate, machine_facts(device))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        report = Report([], {}, 0.0, {}, f"{type(error).__name__}: {first_line[:200]}")
    pipe.send(report)
    pipe.close()
    os._exit(0)  # as the trainer ends: threads of the process group need not be waited for


def _do(job: Job, world: int, device: torch.device) -> Done:
    method_class, config = resolve(job.section)
    method = method_class(config, torch.Generator().manual_seed(0))
    layout = engines.Layout(job.batch, 1, world, precision=job.precision, persistence_threshold=job.threshold)
    sides: step.Sides = {
        side: engines.SideEngine(getattr(method, side), groups, layout._replace(stage=job.stages[side]), device)
        for side, groups in method.parameter_groups().items()
    }
    updates = _Updates(method, sides, job, device)
    for _ in range(WARM_UPS_AT_3 if 3 in job.stages.values() else WARM_UPS):
        updates.prepare()
        updates.take()
    # Whole cycles of a method's turns, so that the mean of them is what an update is.
    rounds = [None] * (-(-job.rounds // cycle(method)) * cycle(method))
    done = Done([], [], [], [])
    for _ in rounds:
        updates.prepare()
        done.seconds.append(updates.take().seconds)
    for _ in rounds or range(cycle(method)):
        updates.prepare()
        with noted(device) as log:
            taken = updates.take()
        done.noted.append(log)
        done.apart.append(taken.seconds)
        done.on_a_core.append(_on_a_core(taken, log, device))
    return done


class _Taken(NamedTuple):
    seconds: float
    on_a_core: float


def _on_a_core(taken: _Taken, log: Sequence[Noted], device: torch.device) -> float:
    """Return what `Done.on_a_core` is of an update and its collectives."""
    if device.type == "cuda":  # the thread only tells the GPU what to do, and in the backward pass another one does
        return taken.seconds - sum(one.left - one.arrived for one in log)
    return taken.on_a_core - sum(one.on_a_core for one in log)


class _Updates:
    """Takes one update after the other."""

    def __init__(self, method: Method, sides: step.Sides, job: Job, device: torch.device) -> None:
        self._method, self._sides, self._job, self._device = method, sides, job, device
        self._pools, self._number = ImagePools((), 0, 0), -1

    def prepare(self) -> None:
        """Draw the pictures of the next update, the same on all ranks, and wait for all of them."""
        self._number += 1
        stream = self._method.streams[self._number % len(self._method.streams)]
        job = self._job
        self._batch = made_batch(self._method, stream, job.batch, job.size, self._number, self._device)
        settle(self._device)
        barrier()

    def take(self) -> _Taken:
        start, running = time.monotonic(), time.thread_time()
        step.update(
            self._method, self._sides, [self._batch], self._pools, seed=0, number=self._number, images_seen=0
        )  # fmt: skip
        settle(self._device)
        return _Taken(time.monotonic() - start, time.thread_time() - running)


def _probe(world: int, device: torch.device) -> dict[str, dict[int, float]]:
    """Return the median seconds of collectives between ranks that do nothing else, by kind and bytes."""
    if world == 1:
        return {}
    found: dict[str, dict[int, float]] = {kind: {} for kind in ("all_reduce", "all_gather", "reduce_scatter")}
    for size, tries in _PROBES.items():
        part = torch.ones(-(-size // 4 // world), device=device)
        whole = part.repeat(world)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": functools.partial(distributed.all_reduce, whole if size > 4 else part),
            "all_gather": functools.partial(distributed.all_gather_into_tensor, whole, part),
            "reduce_scatter": functools.partial(distributed.reduce_scatter_tensor, part, whole),
        }
        for kind, call in calls.items():
            found[kind][size] = statistics.median(_seconds(call, device) for _ in range(tries))
    return found


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    settle(device)
    barrier()
    start = time.monotonic()
    call()
    settle(device)
    return time.monotonic() - start
