"""What became of the pictures of a domain that was packed, and tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from i2i_dist.data.labels import SampleLabels, label_text

_SIZES_SHOWN = 3
_CLASSES_SHOWN = 32


class Packed(NamedTuple):
    """What became of one domain.

    Attributes:
        domain: The domain's folder.
        shards: Number of shards.
        bytes: Bytes of the images.
        sizes: Number of images for each (width, height).
        unreadable: Path and reason of each image that was left out.
        labels: What is known of the images; None in a data set without labels.
    """

    domain: str
    shards: int
    bytes: int
    sizes: Counter[tuple[int, int]]
    unreadable: list[str]
    labels: SampleLabels | None = None


def summary(results: Sequence[Packed]) -> str:
    """Return a table: domain, images, shards, bytes, left out, and the most frequent sizes."""
    rows: list[tuple[str, ...]] = [("domain", "images", "shards", "bytes", "left out", "sizes (width x height)")]
    for r in results:
        common = r.sizes.most_common(_SIZES_SHOWN)
        sizes = [f"{width}x{height}: {count}" for (width, height), count in common]
        if len(r.sizes) > len(common):
            sizes.append(f"{len(r.sizes) - len(common)} other sizes: {r.sizes.total() - sum(n for _, n in common)}")
        counts = (r.sizes.total(), r.shards, r.bytes, len(r.unreadable))
        rows.append((r.domain, *(f"{count:,}" for count in counts), ", ".join(sizes)))
    return _aligned(rows, left={0, len(rows[0]) - 1})


def label_summary(domain: str, labels: SampleLabels) -> str:
    """Return two tables of a domain: how often each attribute holds, and how often each combination is there.

    Combinations are those of images of which all attributes are known, the most frequent first.
    """
    values = labels.values
    known, whole = values >= 0, (values >= 0).all(axis=1)
    unknown = int((~known).all(axis=1).sum())
    lines = [
        f"{domain}: {len(values) - unknown:,} images with labels, {unknown:,} without"
        + (f", {partly:,} of those with labels in part" if (partly := len(values) - unknown - int(whole.sum())) else "")
    ]
    attributes: list[tuple[str, ...]] = [("attribute", "holds", "of")]
    for name, column, told in zip(labels.attributes, values.T, known.T, strict=True):
        attributes.append((name, f"{int((column == 1).sum()):,}", f"{int(told.sum()):,}"))
    lines.append(_aligned(attributes, left={0}))
    combinations, counts = np.unique(values[whole], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    classes: list[tuple[str, ...]] = [("class", "images")]
    for number in order[:_CLASSES_SHOWN]:
        classes.append((label_text(labels.attributes, combinations[number].tolist()), f"{counts[number]:,}"))
    lines.append(_aligned(classes, left={0}))
    if len(order) > _CLASSES_SHOWN:
        rest = order[_CLASSES_SHOWN:]
        lines.append(f"and {len(rest)} more, with {int(counts[rest].sum()):,} images")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Align columns: those in `left` at their beginnings, the others at their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
