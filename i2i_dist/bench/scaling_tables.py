"""The tables of `bench.py scaling` and docs/scaling.md, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from i2i_dist.bench.cost_model import FAST, FP32, NODE, SLOW, Assumed, Gpu, Prediction, predict
from i2i_dist.bench.tables import aligned, milliseconds, percent
from i2i_dist.bench.update_counts import Counts
from i2i_dist.method import Side

WORLDS = (8, 64, 512, 4096)
STRONG_BATCH, STRONG_WORLDS = 64, (1, 8, 16, 32, 64)
MOST_PER_GPU = 8
USABLE = 0.8  # of a GPU's memory: the rest is workspace, fragments, and what is not counted
BUSY = 0.1  # of an update of one rank without a processor: somebody else has them
MODEL = "MODEL, not measured"
REPLICATED: Mapping[Side, int] = {"generator": 0, "discriminator": 0}

PARTS = ("computing", "without a processor", "communicating", "waiting")


def measured_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of measured updates; times in ms."""
    rows = [["ranks", "update (p20 .. p80)", "images/s", *PARTS, "taken apart", "predicted", "error"]]
    for one in result["worlds"]:
        low, high = one["spread"]["p20"], one["spread"]["p80"]
        row = [str(one["world"]), f"{_ms(one['seconds'])} ({_ms(low)} .. {_ms(high)})"]
        row.append(f"{one['world'] * result['batch'] / one['seconds']:.3g}")
        whole = one["parts"]["whole"]
        row += [f"{_ms(one['parts'][part])} ({percent(one['parts'][part] / whole)})" for part in PARTS]
        row.append(_ms(whole))
        predicted = one.get("predicted")
        row += ["", ""] if predicted is None else [_ms(predicted), f"{100 * (predicted / one['seconds'] - 1):+.0f} %"]
        rows.append(row)
    return rows


def traffic_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of collectives, counted and by the formula."""
    rows = [["ZeRO", "collective", "calls, counted", "by formula", "bytes, counted", "by formula", "difference"]]
    for one in result["traffic"]:
        stages = " / ".join(str(stage) for stage in dict.fromkeys(one["stages"].values()))
        for kind in sorted({*one["counted"], *one["formula"]}):
            counted, formula = (one[key].get(kind, {"calls": 0, "bytes": 0}) for key in ("counted", "formula"))
            difference = formula["bytes"] / counted["bytes"] - 1 if counted["bytes"] else math.inf
            cells = [f"{counted['calls']:g}", f"{formula['calls']:g}"]
            cells += [f"{counted['bytes']:,.0f}", f"{formula['bytes']:,.0f}", f"{100 * difference:+.2f} %"]
            rows.append([stages, kind.replace("_", "-"), *cells])
    return rows


def measured_text(result: Mapping[str, Any]) -> str:
    """Return what was measured, for the terminal."""
    return "\n".join(
        [
            ", ".join(f"{key} {value}" for key, value in result["machine"].items()),
            f"{result['config']}, {setting(result)}; {utilisation(result)}",
            "",
            f"Measured; ms. {caveats(result)}".rstrip(),
            *aligned(measured_rows(result)),
            "",
            f"What {_counting_world(result)} ranks send in an update, counted, and by the model's formula",
            *aligned(traffic_rows(result)),
        ]
    )


def setting(result: Mapping[str, Any]) -> str:
    """Say what an update was."""
    stages = " and ".join(f"{side} at ZeRO {stage}" for side, stage in result["stages"].items())
    return f"{result['size']} x {result['size']}, {result['batch']} samples on each rank, {stages}"


def utilisation(result: Mapping[str, Any]) -> str:
    """Say how much of what large matrix products reach one rank's update reaches."""
    work = result["counts"]["flops"] * result["batch"] / result["counts"]["batch"]
    rate = work / result["worlds"][0]["seconds"]
    return (
        f"{work / 1e9:.3g} GFLOP in an update, on one rank {rate / 1e9:.3g} GFLOP/s, "
        f"{percent(rate / result['product_rate'])} of what large matrix products reach here"
    )


def caveats(result: Mapping[str, Any]) -> str:
    """Say which times cannot tell how training scales: those of ranks that had to share processors."""
    processors, found = result["machine"]["processors"], []
    more = [str(one["world"]) for one in result["worlds"] if one["world"] > processors]
    if result["kind"] == "cpu" and more:
        found.append(
            f"With {' and '.join(more)} ranks there are more ranks than the {processors} processors, which they share: "
            "these rows say how the split behaves, not how training scales."
        )
    alone = result["worlds"][0]["parts"]
    if result["kind"] == "cpu" and alone["without a processor"] > BUSY * alone["whole"]:
        found.append(
            "Other programs had the processors for much of the time, as the row of one rank shows: the times, and what "
            "is predicted from them, are not to be relied on. Bytes and calls are as they would be anyhow."
        )
    return " ".join(found)


def _counting_world(result: Mapping[str, Any]) -> int:
    return int(result["traffic"][0]["world"]) if result["traffic"] else 1


def predicted_text(result: Mapping[str, Any], gpu: Gpu) -> str:
    """Return what the model says of this configuration, for the terminal."""
    counts, stages = Counts.from_json(result["counts"]), result["stages"]
    lines = ["", f"{MODEL}: {gpu.name}, {result['batch']} samples on each GPU; times in ms"]
    lines += aligned(weak_detail(counts, result["batch"], gpu, stages))
    lines += ["", f"{MODEL}: {gpu.name}, a fixed global batch of {STRONG_BATCH}: how many times as fast as one GPU"]
    lines += aligned(
        [["", *(f"{world} GPUs" for world in STRONG_WORLDS[1:])], ["", *strong_cells(counts, gpu, stages)]]
    )
    lines += [
        "",
        f"Assumed: {assumptions(gpu)}",
        "docs/scaling.md says what the model leaves out and where it was checked.",
    ]
    return "\n".join(lines)


def assumptions(gpu: Gpu) -> str:
    """Say what the model takes for granted."""
    peak, inside, between = gpu.peak / 1e12, gpu.nvlink / 1e9, NODE * gpu.network / 1e9
    used, links = (f"{100 * low:.0f} to {100 * high:.0f} %" for low, high in zip(SLOW[::2], FAST[::2], strict=True))
    return (
        f"convolutions and products reach {used} of {peak:.0f} TFLOP/s (dense bf16); an operator is started every "
        f"{FAST.start * 1e6:.0f} to {SLOW.start * 1e6:.0f} µs; links reach {links} of {inside:.0f} GB/s from each GPU "
        f"within a machine of eight, and of {between:.0f} GB/s from one machine to the next; latencies are those of "
        "NCCL's own model; nothing overlaps."
    )


def weak_detail(counts: Counts, batch: int, gpu: Gpu, stages: Mapping[Side, int]) -> list[list[str]]:
    """Return a row for each number of GPUs."""
    rows = [["GPUs", "computing", "communicating", "images/s", "efficiency"]]
    for world in WORLDS:
        band = Band(counts, batch, world, gpu, stages)
        computing = _between(1e3 * band.fast.computing, 1e3 * band.slow.computing)
        communicating = _between(1e3 * band.fast.communicating, 1e3 * band.slow.communicating)
        rows.append([str(world), computing, communicating, band.images, band.efficiency])
    return rows


class Band:
    """A prediction with both ends of what is assumed."""

    def __init__(self, counts: Counts, batch: int, world: int, gpu: Gpu, stages: Mapping[Side, int]) -> None:
        def of(assumed: Assumed) -> Prediction:
            return predict(counts, batch, world, gpu, assumed, stages)

        self.slow, self.fast = of(SLOW), of(FAST)
        # Communication weighs most where computing is fast and links are slow.
        self.worst, self.best = of(FAST._replace(link=SLOW.link)), of(SLOW._replace(link=FAST.link))

    @property
    def images(self) -> str:
        """Images per second."""
        return _between(self.slow.images_per_second, self.fast.images_per_second)

    @property
    def efficiency(self) -> str:
        """In %."""
        return f"{100 * self.worst.efficiency:.0f} .. {100 * self.best.efficiency:.0f} %"


def state_bytes(counts: Counts) -> int:
    """Return what parameters, gradients, moments and averages take where everything is replicated."""
    return FP32 * (4 * sum(side.elements for side in counts.sides.values()) + counts.sides["generator"].elements)


def largest_batch(counts: Counts, state: int, memory: float, most: int = MOST_PER_GPU) -> int | None:
    """Return how many samples, up to `most` or a group, fit beside the state; None where not one group does."""
    each, batch, found = counts.saved_bytes / counts.batch, counts.batch, None
    while state + batch * each <= USABLE * memory and (batch <= most or found is None):
        found, batch = batch, 2 * batch
    return found


def weak_cells(counts: Counts, gpu: Gpu) -> list[str]:
    """Return the cells of a method and size: samples on each GPU, and a prediction for each number of GPUs."""
    batch = largest_batch(counts, state_bytes(counts), gpu.memory)
    if batch is None:
        return ["does not fit", *[""] * len(WORLDS)]
    bands = [Band(counts, batch, world, gpu, REPLICATED) for world in WORLDS]
    return [str(batch), *(f"{band.images}; {band.efficiency}" for band in bands)]


def strong_cells(counts: Counts, gpu: Gpu, stages: Mapping[Side, int]) -> list[str]:
    """Return, for each number of GPUs, how many times as fast as one they are with a fixed global batch."""
    most = largest_batch(counts, state_bytes(counts), gpu.memory, STRONG_BATCH) or counts.batch

    def seconds(world: int, assumed: Assumed) -> float:
        share = STRONG_BATCH // world
        one = predict(counts, min(most, share), world, gpu, assumed, stages)
        return math.ceil(share / min(most, share)) * one.computing + one.communicating

    cells = []
    for world in STRONG_WORLDS[1:]:
        if STRONG_BATCH // world < counts.batch:
            cells.append("no whole group")
            continue
        found = [seconds(1, assumed) / seconds(world, assumed) for assumed in (SLOW, FAST)]
        cells.append(_between(min(found), max(found)))
    return cells


def counted_cells(counts: Counts) -> list[str]:
    """Return, for one sample of each domain, what was counted."""
    saved = counts.saved_bytes / counts.batch / 2**30
    return [f"{counts.flops / counts.batch / 1e12:.3g}", f"{counts.operators:.0f}", f"{saved:.3g}"]


def _ms(seconds: float) -> str:
    return milliseconds(1e3 * seconds)


def _between(low: float, high: float) -> str:
    return f"{two_digits(low)} .. {two_digits(high)}"


def two_digits(value: float) -> str:
    """Return two digits, or all before the point."""
    if value == 0:
        return "0"
    places = max(0, 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, 1 - math.floor(math.log10(abs(value))))
    return f"{rounded:,.{places}f}"
