"""Tables of the kernels' figures: as text for the terminal and, cell by cell, for docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TITLES = {"cpu": "aten ops", "cuda": "launches"}


def columns(kind: str) -> list[str]:
    """Return the titles of the table on a kind of device."""
    graph = ["in a CUDA graph"] if kind == "cuda" else []
    times = ["form", "forward", "backward", "both (p20 .. p80)", *graph]
    return [*times, TITLES[kind], "memory", "of the floor", "error"]


def cells(row: dict[str, Any], kind: str) -> list[str]:
    """Return the cells of a form; one that failed has its reason in the last."""
    if "both" not in row:
        return [row["form"], *[""] * (len(columns(kind)) - 2), f"failed: {row['failure']}"]
    both, share = row["both"], row["share_of_floor"]
    times = [milliseconds(row["forward"]["median"])]
    times.append("in forward" if row["gradient_only"] else milliseconds(row["backward"]["median"]))
    times.append(f"{milliseconds(both['median'])} ({milliseconds(both['p20'])} .. {milliseconds(both['p80'])})")
    if kind == "cuda":
        times.append(milliseconds(row["graph"]["median"]) if "graph" in row else "no")
    counts = ["" if row["launches"] is None else str(row["launches"]), memory(row["peak_bytes"])]
    stopped = f"; then failed: {row['failure']}" if row["failure"] else ""
    return [row["form"], *times, *counts, percent(share) + stopped, f"{row['error']:.0e}"]


def milliseconds(value: float) -> str:
    """Return three digits, in ms."""
    return f"{value:.{max(0, 2 - _exponent(value))}f}" if value < 100 else f"{value:.0f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def percent(share: float) -> str:
    """Return two digits, or all before the point, in %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def memory(value: int | None) -> str:
    """Return bytes in MiB."""
    return "" if value is None else f"{value / 2**20:.3g} MiB" if value < 1000 * 2**20 else f"{value / 2**30:.3g} GiB"


def kernel_table(cases: Sequence[dict[str, Any]], kind: str) -> str:
    """Return the cases as text."""
    lines = []
    for case in cases:
        lines += ["", f"{case['name']}; floor {milliseconds(case['floor'])} ms; times in ms"]
        rows = [columns(kind), *(cells(row, kind) for row in case["rows"])]
        lines += aligned(rows)
    return "\n".join(lines)


SHARE_COLUMNS = ["op", "calls", "before: forward + backward", "share", "after: forward + backward", "share"]


def share_rows(step: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a step: for each op calls, ms and share of the step before and after; then the whole step."""
    modes = ("reference", "native")
    totals = {mode: step[mode]["total"]["median"] for mode in modes}
    rows = []
    for op in step["native"]["ops"]:
        row = [op, f"{step['native']['ops'][op]['calls']:g}"]
        for mode in modes:
            times = [step[mode]["ops"][op][part] for part in ("forward", "backward")]
            row += [" + ".join(map(milliseconds, times)), f"{100 * sum(times) / totals[mode]:.1f} %"]
        rows.append(row)
    return [*rows, ["whole step", "", milliseconds(totals["reference"]), "", milliseconds(totals["native"]), ""]]


def share_table(result: dict[str, Any]) -> str:
    """Return the shares as text."""
    lines = [", ".join(f"{key} {value}" for key, value in result["machine"].items())]
    for step in result["steps"]:
        lines += ["", f"{step['name']}, {result['setting']['size']} x {result['setting']['size']}; times in ms"]
        lines += aligned([SHARE_COLUMNS, *share_rows(step)])
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns of one width."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown whose first row is its head."""
    head, *rest = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])
