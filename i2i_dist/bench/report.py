"""Makes docs/kernels.md and its plots from the template and the measurements in docs/kernels/: `bench.py report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from i2i_dist.bench.chart import draw, ratios
from i2i_dist.bench.tables import (
    SHARE_COLUMNS,
    cells,
    columns,
    markdown,
    memory,
    milliseconds,
    percent,
    share_rows,
)

DOCS = Path(__file__).parents[2] / "docs"
EXPECTED = {"cpu": "CPU", "h200": "NVIDIA H200"}
"""The devices that the page is to speak of: the name of the JSON file, and that of the device."""
OPS = {
    "patch_nce": "PatchNCE, groups x rows of 256 channels",
    "adalin": "AdaLIN",
    "iln": "ILN",
    "instance_norm_act": "Instance norm with ReLU",
    "patch_gather": "Sampling of 256 patches",
}
RIVALS = ("eager", "eager, group norm", "torch.compile", "torch.compile max-autotune", "attention, gradient only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench.py report`."""
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="default: docs/ of the repository")


def run(options: argparse.Namespace) -> int:
    """Write the page and the plots."""
    for name, text in generate(options.docs / "kernels").items():
        (options.docs / name).write_text(text)
        print(options.docs / name)
    return 0


def generate(folder: Path) -> dict[str, str]:
    """Return the texts of the page and the plots, by their paths in docs/, from what lies in docs/kernels/."""
    kinds = {name: _read(folder / f"{name}.json") for name in EXPECTED}
    kinds |= {path.stem: _read(path) for path in sorted(folder.glob("*.json")) if "." not in path.stem}
    shares = {name: _read(folder / f"{name}.share.json") for name in kinds}
    page = (folder / "template.md").read_text()
    page = page.replace("{{figures}}", "\n\n".join(_figures(name, found) for name, found in kinds.items()))
    page = page.replace("{{share}}", "\n\n".join(_share(name, found) for name, found in shares.items()))
    plots = {
        f"kernels/{name}.svg": draw(
            found["cases"], f"Forward and backward, times as long as ours, {_label(name, found)}"
        )
        for name, found in kinds.items()
        if found is not None
    }
    return {"kernels.md": page, **plots}


def _read(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _label(name: str, found: dict[str, Any] | None) -> str:
    return EXPECTED[name] if found is None else str(found["machine"]["device"])


def _not_measured(name: str) -> str:
    return f"### {EXPECTED.get(name, name)}\n\nNot measured yet. `make bench-kernels` on such a machine fills this in."


def _figures(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return _not_measured(name)
    rates = found["rates"]
    reached = [f"copies {rates['copy'] / 1e9:.3g} GB/s"]
    reached += [f"{key} products {rate / 1e12:.3g} TFLOP/s" for key, rate in rates.items() if key != "copy"]
    parts = [f"### {_label(name, found)}", _commands(found), _machine(found)]
    parts += [f"Rates of the floor: {', '.join(reached)}.", f"![time relative to ours](kernels/{name}.svg)"]
    for op, title in OPS.items():
        cases = [case for case in found["cases"] if case["op"] == op]
        if cases:
            parts += [f"#### {title}", markdown(_summary(cases)), _details(cases, found["kind"])]
    return "\n\n".join(parts)


def _commands(found: dict[str, Any]) -> str:
    return "Made by " + ", ".join(f"`{command}`" for command in found["commands"]) + " on:"


def _machine(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found["machine"].items()) + "."


def _summary(cases: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the short table: of each case ours, and how many times as much time the others take."""
    forms = [form for form in RIVALS if any(row["form"] == form for case in cases for row in case["rows"])]
    head = ["case", "ours, ms", *(f"{form} / ours" for form in forms), "of the floor"]
    rows = [[*head, "memory of ours", "memory, eager / ours"]]
    for case in cases:
        by_form = {row["form"]: row for row in case["rows"]}
        ours, eager, found = by_form["ours"], by_form["eager"], ratios(case)
        row = [f"{case['size']} {case['precision']}"]
        row.append(milliseconds(ours["both"]["median"]) if "both" in ours else "failed")
        for form in forms:
            failed = "failed" if form in by_form and by_form[form]["failure"] else ""
            row.append(f"{found[form]:.3g}" if form in found else failed)
        row.append(percent(ours["share_of_floor"]) if "both" in ours else "")
        rows.append([*row, memory(ours["peak_bytes"]), _quotient(eager["peak_bytes"], ours["peak_bytes"])])
    return rows


def _quotient(one: int | None, other: int | None) -> str:
    return f"{one / other:.3g}" if one and other else ""


def _details(cases: list[dict[str, Any]], kind: str) -> str:
    rows = [["case", "floor", *columns(kind)]]
    for case in cases:
        name = f"{case['size']} {case['precision']}"
        for number, row in enumerate(case["rows"]):
            own = [name, milliseconds(case["floor"])] if number == 0 else ["", ""]
            rows.append([*own, *cells(row, kind)])
    return f"<details><summary>All forms; times in ms</summary>\n\n{markdown(rows)}\n\n</details>"


def _share(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return _not_measured(name)
    parts = [f"### {_label(name, found)}", _commands(found), _machine(found)]
    for step in found["steps"]:
        size = "{size} x {size}, width {width}, batch {batch}".format(**found["setting"])
        parts += [f"{step['name']}, {size}; ms:", markdown([SHARE_COLUMNS, *share_rows(step)])]
    return "\n\n".join(parts)
