"""A model of how long an update takes on many GPUs. Nothing here is measured: figures of devices are their makers'.

An update is its computing, and after it its collectives: DeepSpeed hides nothing at ZeRO 0 to 2, and what it hides at
ZeRO 3 is not counted here. Computing takes as long as its multiplications and additions at a share of the GPU's peak,
or as starting its operators one by one, whichever is longer. Collectives follow NCCL's own model of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from i2i_dist.bench.update_counts import Counts, SideCounts
from i2i_dist.engines import LARGEST_BUCKET, PERSISTENCE_THRESHOLD
from i2i_dist.method import SIDES, Side

FP32 = 4  # bytes
_BUCKET = 500_000_000  # elements that DeepSpeed reduces in one call at ZeRO 0


class Gpu(NamedTuple):
    """A GPU in a machine of eight.

    Attributes:
        name: With its form.
        peak: Dense bf16 products: operations per second.
        memory: Bytes.
        nvlink: Bytes per second that it sends to the others of its machine.
        network: Bytes per second that it sends to other machines, by an adapter of its own.
        source: Where these figures are from.
    """

    name: str
    peak: float
    memory: int
    nvlink: float
    network: float
    source: str


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 312e12, 80 * 10**9, 300e9, 25e9, "NVIDIA's data sheets of A100 and DGX A100 (HDR)"),
    "h100": Gpu("H100 SXM 80 GB", 989e12, 80 * 10**9, 450e9, 50e9, "NVIDIA's data sheets of H100 and DGX H100 (NDR)"),
    "h200": Gpu("H200 SXM 141 GB", 989e12, 141 * 10**9, 450e9, 50e9, "NVIDIA's data sheets of H200 and DGX H200 (NDR)"),
}
NODE = 8  # GPUs


class Assumed(NamedTuple):
    """What nobody has measured for these networks.

    Attributes:
        utilisation: Share of the peak that convolutions and products reach.
        start: Seconds from one operator's start to the next one's.
        link: Share of NVLink's and the network's rate that large messages reach.
    """

    utilisation: float
    start: float
    link: float


SLOW, FAST = Assumed(0.25, 10e-6, 0.6), Assumed(0.45, 4e-6, 0.85)
"""The ends of the band. A fast GPU makes communication weigh more, so that efficiency is reckoned with both mixed."""


class Call(NamedTuple):
    """Collectives of one kind and size: `bytes` of a whole tensor, over all ranks; `calls` in an update."""

    kind: str
    bytes: float
    calls: float


def traffic(
    counts: Counts, stages: Mapping[Side, int], world: int, threshold: int = PERSISTENCE_THRESHOLD
) -> list[Call]:
    """Return the collectives of an update with one micro-batch on each rank, without clipping.

    At ZeRO 0 a side's gradients are summed over the ranks. ZeRO 1 and 2 sum them in the same way, in buckets, and bring
    the new parameters together, group by group. ZeRO 3 scatters the sums and brings together the parameters that it has
    cut for every pass; those of fewer than `threshold` elements once after the step, each by itself. Parameters are
    padded to a multiple of the ranks, which is not counted.
    """
    if world == 1:
        return []
    calls = [
        Call(own.kind, own.own_bytes * (world if own.kind == "all_gather" else 1), own.calls) for own in counts.own
    ]
    for side in SIDES:
        calls += _of_side(counts.sides[side], stages[side], threshold)
    return calls


def _of_side(side: SideCounts, stage: int, threshold: int) -> list[Call]:
    whole, groups, steps = FP32 * side.elements, side.groups, side.steps
    if stage == 0:
        pieces = math.ceil(side.elements / _BUCKET)
        return [Call("all_reduce", whole / pieces, pieces * steps)]
    norms = Call("all_reduce", FP32 * (2 if stage == 3 else 1), len(groups) * steps)
    if stage < 3:
        pieces = math.ceil(side.elements / LARGEST_BUCKET)
        new = [Call("all_gather", FP32 * sum(group), steps) for group in groups]
        return [Call("all_reduce", whole / pieces, pieces * steps), norms, *new]
    sizes = [pair for group in zip(groups, side.fetched, strict=True) for pair in zip(*group, strict=True)]
    kept = [Call("all_gather", FP32 * size, steps) for size, _ in sizes if size <= threshold]
    # Prefetched together, or module by module.
    cut = [(FP32 * size, times) for size, times in sizes if size > threshold]
    fetched = [Call("all_gather", size, times) for size, times in cut]
    if side.steady and cut:
        fetched = [Call("all_gather", sum(size for size, _ in cut), max(times for _, times in cut))]
    return [Call("reduce_scatter", whole, steps), norms, *kept, *fetched]


def sent(call: Call, world: int) -> float:
    """Return the bytes that a rank sends for these calls in a ring."""
    share = (world - 1) / world
    return call.calls * call.bytes * share * (2 if call.kind == "all_reduce" else 1)


# Microseconds, of NCCL's tuning model (src/graph/tuning.cc): before anything is sent, and for a step within a machine
# and between two. "LL" are its small messages, which reach a quarter of the rate; their steps within a machine take 1.8
# times as long where there are several machines, which is reckoned always. A tree serves all-reduce alone.
_RING = {"simple": (8.4, 3.4, 9.6, 1.0), "ll": (3.6, 0.47 * 1.8, 2.7, 1 / 4)}
_TREE = {"simple": (0.0, 28.0, 50.0, 0.9), "ll": (4.4, 0.52 * 1.8, 5.0, 1 / 3.8)}


def collective_seconds(call: Call, world: int, gpu: Gpu, link: float) -> float:
    """Return how long one such call takes on `world` GPUs: the fastest of NCCL's ways."""
    if world == 1:
        return 0.0
    nodes, reduces = math.ceil(world / NODE), call.kind == "all_reduce"
    rate = link * (gpu.nvlink if nodes == 1 else min(gpu.nvlink, NODE * gpu.network))
    times = []
    for base, inside, between, share in _RING.values():
        steps, crossings = (1 + reduces) * (world - 1), (1 + reduces) * (nodes - 1)
        latency = base + (steps - crossings) * inside + crossings * between
        times.append(latency * 1e-6 + call.bytes * steps / world / (rate * share))
    for base, inside, between, share in _TREE.values() if reduces else ():
        latency = base + 2 * ((min(world, NODE) - 1) * inside + math.log2(nodes) * between)
        times.append(latency * 1e-6 + 2 * call.bytes / (rate * share))
    return min(times)


class Prediction(NamedTuple):
    """Seconds of an update on one of `world` GPUs with `batch` samples each."""

    world: int
    batch: int
    computing: float
    communicating: float

    @property
    def images_per_second(self) -> float:
        """Images of each domain, over all GPUs."""
        return self.world * self.batch / (self.computing + self.communicating)

    @property
    def efficiency(self) -> float:
        """The share of the time that is not communication: images/s beside those of as many single GPUs."""
        return self.computing / (self.computing + self.communicating)


def predict(
    counts: Counts, batch: int, world: int, gpu: Gpu, assumed: Assumed, stages: Mapping[Side, int]
) -> Prediction:
    """Predict an update with `batch` samples on each GPU, from counts with any number of them."""
    flops = counts.flops * batch / counts.batch
    computing = max(flops / (gpu.peak * assumed.utilisation), counts.operators * assumed.start)
    calls = traffic(counts, stages, world)
    communicating = sum(call.calls * collective_seconds(call, world, gpu, assumed.link) for call in calls)
    return Prediction(world, batch, computing, communicating)


class Link(NamedTuple):
    """What was measured of collectives at one number of ranks: seconds of the smallest, bytes sent per second."""

    latency: float
    rate: float


def predict_here(computing: float, calls: list[Call], world: int, cores: int, links: Mapping[str, Link]) -> float:
    """Predict the seconds of an update on this machine's processors.

    Args:
        computing: Seconds of the update on one rank, with one thread.
        calls: Its collectives.
        world: Ranks; those beyond `cores` share them.
        cores: Processors.
        links: By kind of collective.
    """
    communicating = 0.0
    for call in calls:
        link = links.get(call.kind, links["all_reduce"])
        communicating += call.calls * link.latency + sent(call, world) / link.rate
    return computing * max(1.0, world / cores) + communicating
