"""Makes docs/scaling.md from the measurements in docs/scaling/ and the cost model: `bench.py scaling-page`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from i2i_dist.bench.cost_model import FAST, GPUS, SLOW, predict, sent, traffic
from i2i_dist.bench.report import DOCS
from i2i_dist.bench.scaling_tables import (
    MODEL,
    REPLICATED,
    STRONG_WORLDS,
    USABLE,
    WORLDS,
    assumptions,
    caveats,
    counted_cells,
    largest_batch,
    measured_rows,
    setting,
    strong_cells,
    traffic_rows,
    two_digits,
    utilisation,
    weak_cells,
)
from i2i_dist.bench.tables import markdown, percent
from i2i_dist.bench.update_counts import Counts, count, sketch
from i2i_dist.memory import side_memory
from i2i_dist.method import SIDES, Method, Side
from i2i_dist.methods import METHODS, resolve

SIZES = (256, 512, 1024)
EXPECTED = {"cpu": "CPU", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}
"""The devices that the page is to speak of, by the ends of the names of the measurements' files."""
PAGE_GPU = GPUS["h100"]
MEMORIES = (16, 24, 80)  # GB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench.py scaling-page`."""
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="default: docs/ of the repository")


def run(options: argparse.Namespace) -> int:
    """Count every method's update, and write the counts and the page."""
    folder = options.docs / "scaling"
    entries = [json.dumps(entry) for entry in _count_all()]
    (folder / "counts.json").write_text("[\n" + ",\n".join(entries) + "\n]\n")
    (options.docs / "scaling.md").write_text(generate(folder))
    print(options.docs / "scaling.md")
    return 0


def _section(name: str, size: int) -> dict[str, Any]:
    """Return a method's default preset; the critics of those with labels are made for one size of pictures."""
    return {"name": name} | ({"image_size": size} if "image_size" in METHODS[name].Config.model_fields else {})


def _sketch(name: str, size: int) -> Method:
    return sketch(*resolve(_section(name, size)))


def _count_all() -> Iterator[dict[str, Any]]:
    for name in METHODS:
        for size in SIZES:
            print(f"counting {name} at {size} x {size}", file=sys.stderr, flush=True)
            section = _section(name, size)
            counts = count(*resolve(section), _sketch(name, size).group, size)
            yield {"name": name, "size": size, "counts": counts.as_json()}


class Counted(NamedTuple):
    """A method's default preset at one size."""

    name: str
    size: int
    counts: Counts

    @property
    def label(self) -> str:
        """What its rows are called."""
        return f"{self.name} {self.size}"


def generate(folder: Path) -> str:
    """Return the page, from what lies in docs/scaling/."""
    entries = json.loads((folder / "counts.json").read_text())
    counted = [Counted(one["name"], one["size"], Counts.from_json(one["counts"])) for one in entries]
    of_256 = [one for one in counted if one.size == SIZES[0]]
    measured = sorted(path for path in folder.glob("*.*.json"))
    parts = {
        "measured": "\n\n".join(_measured(measured)),
        "assumptions": "\n".join(f"* {gpu.name}: {assumptions(gpu)} Source: {gpu.source}." for gpu in GPUS.values()),
        "counted": markdown(_counted_rows(counted)),
        "weak": "\n\n".join(_weak(counted)),
        "strong": markdown(_strong_rows(of_256)),
        "zero": markdown(_zero_rows(of_256)),
        "fits": markdown(_fits_rows([one for one in counted if one.name == "ugatit"])),
        "limits": markdown(_limit_rows()),
    }
    page = (folder / "template.md").read_text()
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def _measured(paths: list[Path]) -> Iterator[str]:
    for kind, device in EXPECTED.items():
        found = [json.loads(path.read_text()) for path in paths if path.name.endswith(f".{kind}.json")]
        yield f"### {device}"
        if not found:
            yield "Not measured yet. `make bench-scaling` on such a machine fills this in."
        for result in found:
            yield f"#### {result['config']}: {result['method']['name']}, {setting(result)}"
            facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
            yield f"Made by `{result['command']}` on: {facts}. {utilisation(result)}."
            yield f"Times in ms. {caveats(result)}".rstrip()
            yield markdown(measured_rows(result))
            world = result["traffic"][0]["world"]
            yield f"What {world} ranks send in an update, counted from the calls, and by the formula of the model:"
            yield markdown(traffic_rows(result))


def _counted_rows(counted: list[Counted]) -> list[list[str]]:
    rows = [["method", "parameters, generator + discriminator", "TFLOP", "operators", "kept for backward, GiB"]]
    for one in counted:
        elements = " + ".join(f"{one.counts.sides[side].elements / 1e6:.3g} M" for side in SIDES)
        rows.append([one.label, elements, *counted_cells(one.counts)])
    return rows


def _weak(counted: list[Counted]) -> Iterator[str]:
    for gpu in GPUS.values():
        rows = [["method", "samples on each", *(f"{world:,} GPUs" for world in WORLDS)]]
        rows += [[one.label, *weak_cells(one.counts, gpu)] for one in counted]
        yield f"### {gpu.name}: {MODEL}"
        # One is enough to read; the others are there to be looked up.
        folded = f"<details><summary>{gpu.name}</summary>\n\n{markdown(rows)}\n\n</details>"
        yield markdown(rows) if gpu is PAGE_GPU else folded


def _strong_rows(counted: list[Counted]) -> list[list[str]]:
    rows = [["method", *(f"{world} GPUs" for world in STRONG_WORLDS[1:])]]
    return rows + [[one.name, *strong_cells(one.counts, PAGE_GPU, REPLICATED)] for one in counted]


def _stages(stage: int, method: Method) -> dict[Side, int]:
    return {"generator": stage, "discriminator": min(stage, 2) if method.penalised else stage}


def _state(method: Method, stage: int, world: int) -> int:
    """Return the bytes of both sides' state on a rank, with averages of the generator's side."""
    groups, stages = method.parameter_groups(), _stages(stage, method)
    sides = (side_memory(getattr(method, s), groups[s], stages[s], world, s == "generator") for s in SIDES)
    return sum(memory.whole for memory in sides)


def _zero_rows(counted: list[Counted]) -> list[list[str]]:
    stages, worlds = (0, 1, 3), WORLDS[:2]
    rows = [["method", "parameters"]]
    rows[0] += [f"GiB, ZeRO {stage} on {world}" for world in worlds for stage in stages]
    rows[0] += [f"MB sent, ZeRO {stage} on {worlds[-1]}" for stage in stages]
    rows[0] += [f"update longer, ZeRO {stage} on {worlds[-1]}" for stage in stages[1:]]
    for one in counted:
        method, counts, world = _sketch(one.name, one.size), one.counts, worlds[-1]
        row = [one.name, f"{sum(side.elements for side in counts.sides.values()) / 1e6:.3g} M"]
        row += [f"{_state(method, stage, world) / 2**30:.2f}" for world in worlds for stage in stages]
        calls = [traffic(counts, _stages(stage, method), world) for stage in stages]
        row += [f"{sum(sent(call, world) for call in some) / 1e6:.0f}" for some in calls]
        rows.append([*row, *(_longer(counts, _stages(stage, method), world) for stage in stages[1:])])
    return rows


def _longer(counts: Counts, stages: Mapping[Side, int], world: int) -> str:
    """Say how much longer an update with one sample or group takes than where all is replicated."""
    shares = []
    for assumed in (SLOW, FAST):
        times = [predict(counts, counts.batch, world, PAGE_GPU, assumed, chosen) for chosen in (REPLICATED, stages)]
        plain, cut = (one.computing + one.communicating for one in times)
        shares.append(cut / plain - 1)
    return f"{percent(min(shares))} .. {percent(max(shares))}"


def _fits_rows(counted: list[Counted]) -> list[list[str]]:
    """Say how many samples fit on GPUs of several sizes, at several stages."""
    rows = [["size", "memory", *(f"ZeRO {stage} on 8" for stage in (0, 1, 3))]]
    for one in counted:
        method = _sketch(one.name, one.size)
        for memory in MEMORIES:
            fits = [largest_batch(one.counts, _state(method, stage, 8), memory * 1e9, 64) for stage in (0, 1, 3)]
            rows.append([str(one.size), f"{memory} GB", *("none" if fit is None else str(fit) for fit in fits)])
    return rows


def _limit_rows() -> list[list[str]]:
    """Say up to how many parameters the state fits, were nothing else in a GPU's memory."""
    worlds = (8, 64)
    head = ["memory", "ZeRO 0", *(f"ZeRO {stage} on {world}" for stage in (1, 3) for world in worlds)]
    rows = [head]
    for memory in MEMORIES:
        each = [16.0, *(8 + 12 / world for world in worlds), *(16 / world for world in worlds)]
        rows.append([f"{memory} GB", *(f"{two_digits(USABLE * memory / one)} G" for one in each)])
    return rows
