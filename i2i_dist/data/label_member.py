"""A sample's labels as they stand in a shard: the member KEY.labels.json beside the image, {"Male": 1, "Young": 0}."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SUFFIX = "labels.json"
MAX_BYTES = 1 << 16  # real ones hold some dozens of names
_SHOWN = 5


def encode_labels(attributes: Sequence[str], values: Sequence[int] | npt.NDArray[np.int8]) -> bytes:
    """Write labels, 1, 0, or -1 for what is not known, as a JSON object of 1, 0 and null."""
    written = {name: None if value < 0 else int(value) for name, value in zip(attributes, values, strict=True)}
    return json.dumps(written, ensure_ascii=False, separators=(",", ":")).encode()


def decode_labels(content: bytes) -> dict[str, int]:
    """Read labels.

    Returns:
        1, 0, or -1 for what is not known, by the attributes' names, which are sorted.

    Raises:
        ValueError: It is not such an object; the message is a clause.
    """
    try:
        pairs = json.loads(content.decode(), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(pairs, _Pairs) or not pairs:
        raise ValueError('is not an object of attributes, such as {"Male": 1, "Young": 0}')
    labels: dict[str, int] = {}
    for name, value in pairs:
        if name in labels:
            raise ValueError(f"names {name!r} twice")
        if not name.isprintable() or not name.strip():
            raise ValueError(f"names an attribute {name!r}, which is not printable text")
        if value is not None and (type(value) is not int or value not in (0, 1)):
            raise ValueError(f"gives {name!r} the value {_shortened(value)}; allowed are 1, 0, and null for not known")
        labels[name] = -1 if value is None else value
    return dict(sorted(labels.items()))


class _Pairs(list[tuple[str, object]]):
    """An object of JSON, with names that stand twice still there twice."""


def _shortened(value: object) -> str:
    if isinstance(value, list):
        return "of a list" if not isinstance(value, _Pairs) else "of an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def other_attributes(found: Sequence[str], expected: Sequence[str]) -> str:
    """Say, as a clause, which names differ."""
    parts = []
    for names, others, what in ((found, expected, "with"), (expected, found, "without")):
        differing = [name for name in names if name not in others]
        if differing:
            more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            parts.append(f"{what} {', '.join(differing[:_SHOWN])}{more}")
    return " and ".join(parts)
