"""Draws the kernels' figures: for each case how many times as long as ours the other forms take, as an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

LABELS, RIGHT, ROW, TOP = 340, 30, 20, 74
WIDTH = 860
MARKS = {
    "eager": ("#c2410c", "circle"),
    "eager, group norm": ("#c2410c", "ring"),
    "torch.compile": ("#3b82f6", "square"),
    "torch.compile max-autotune": ("#3b82f6", "frame"),
    "attention, gradient only": ("#15803d", "diamond"),
}
STYLE = """text { font: 12px system-ui, sans-serif; fill: #24292f } .quiet { fill: #656d76 } .grid { stroke: #d0d7de }
.ours { stroke: #24292f; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .quiet { fill: #9198a1 } .grid { stroke: #3d444d }
.ours { stroke: #e6edf3 } }"""


def draw(cases: Sequence[dict[str, Any]], title: str) -> str:
    """Return the SVG."""
    shown = [(case, ratios(case)) for case in cases]
    values = [1.0, *(ratio for _, found in shown for ratio in found.values())]
    low, high = math.floor(math.log2(min(values)) - 0.1), math.ceil(math.log2(max(values)) + 0.1)
    height = TOP + ROW * len(shown) + 14
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">']
    parts += [f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", _text(10, 18, title), *_legend(shown)]

    def place(exponent: float) -> float:
        return LABELS + (WIDTH - LABELS - RIGHT) * (exponent - low) / (high - low)

    for exponent in range(low, high + 1):
        x, kind = place(exponent), "ours" if exponent == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 10}"/>')
        factor = f"{2**exponent}" if exponent >= 0 else f"1/{2**-exponent}"
        parts.append(_text(x, TOP - 14, "ours" if exponent == 0 else f"{factor} x", "middle"))
    for number, (case, found) in enumerate(shown):
        y = TOP + ROW * number + ROW / 2
        parts.append(_text(LABELS - 14, y + 4, case["name"], "end", quiet=number % 2 == 1))
        parts += [_mark(form, place(math.log2(ratio)), y) for form, ratio in found.items()]
        failed = [row["form"] for row in case["rows"] if row["failure"]]
        if failed:
            parts.append(_text(WIDTH - RIGHT, y + 4, f"failed: {'; '.join(failed)}", "end", quiet=True))
    return "\n".join([*parts, "</svg>"]) + "\n"


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """Return for each other form its time, forward and backward, over that of ours."""
    times = {row["form"]: row["both"]["median"] for row in case["rows"] if "both" in row}
    ours = times.pop("ours", None)
    return {} if ours is None else {form: time / ours for form, time in times.items()}


def _legend(shown: Sequence[tuple[dict[str, Any], dict[str, float]]]) -> list[str]:
    parts, x = [], 16.0
    for form in MARKS:
        if any(form in found for _, found in shown):
            parts += [_mark(form, x, 38), _text(x + 10, 42, form, quiet=True)]
            x += 38 + 6.4 * len(form)
    return parts


def _mark(form: str, x: float, y: float) -> str:
    colour, kind = MARKS[form]
    hollow = kind in ("ring", "frame")
    paint = f'fill="{"none" if hollow else colour}" stroke="{colour}" stroke-width="1.6"'
    if kind in ("circle", "ring"):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5.5 if hollow else 4}" {paint}/>'
    if kind == "diamond":
        return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z" {paint}/>'
    half = 5 if hollow else 3.5
    return f'<rect x="{x - half:.1f}" y="{y - half:.1f}" width="{2 * half}" height="{2 * half}" {paint}/>'


def _text(x: float, y: float, words: str, anchor: str = "start", quiet: bool = False) -> str:
    kind = ' class="quiet"' if quiet else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(words)}</text>'
