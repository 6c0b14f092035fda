"""Finds the pairs of two domains: samples of the same name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from i2i_dist.data.decode import IMAGE_SUFFIXES
from i2i_dist.data.index import Source
from i2i_dist.data.labels import SampleLabels

_SHOWN = 5


class _Reordered:
    """The samples of another source, in another order."""

    labels: SampleLabels | None = None

    def __init__(self, source: Source, counts: Sequence[int], order: npt.NDArray[np.int64]) -> None:
        self.name, self.fingerprint, self.counts = source.name, source.fingerprint, counts
        self.keys = [source.keys[index] for index in order]
        self._source, self._order = source, order

    def read(self, index: int) -> tuple[str, bytes]:
        """Return (key, encoded image) of a sample; raises `BadData` if it is cut, changed or cannot be read."""
        return self._source.read(int(self._order[index]))


def paired(a: Source, b: Source) -> Source:
    """Return `b` in the order of `a`, so that samples of the same number are a pair.

    Args:
        a: The domain that gives the order.
        b: Its samples carry the names of those of `a`; the suffix of an image's name does not count.

    Raises:
        ValueError: A sample has no partner, or a domain has two of one name; the message names the first few.
    """
    names_a, names_b = _names(a), _names(b)
    number = {name: index for index, name in enumerate(names_b)}
    missing = [name for name in names_a if name not in number]
    spare = sorted(number.keys() - set(names_a))
    if missing or spare:
        lines = [f"  only in {s.name}: {_listed(names)}" for s, names in ((a, missing), (b, spare)) if names]
        raise ValueError(
            f"The pictures of {a.name} ({len(names_a)}) and {b.name} ({len(names_b)}) are no pairs, for which both "
            "need the same names, suffixes aside:\n"
            + "\n".join(lines)
            + "\nRename them, or remove what has no partner. "
            "Pictures that hold a pair side by side are cut by `python launchers/pack.py --side-by-side`."
        )
    order = np.fromiter((number[name] for name in names_a), dtype=np.int64, count=len(names_a))
    return _Reordered(b, a.counts, order)


def _names(source: Source) -> list[str]:
    names = [_without_suffix(key) for key in source.keys]
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(
            f"In {source.name} several pictures have the same name, suffixes aside, so that their partners are not "
            f"known: {_listed(twice)}. Rename or remove all but one of each."
        )
    return names


def _without_suffix(key: str) -> str:
    name, dot, suffix = key.rpartition(".")
    return name if dot and suffix.lower() in IMAGE_SUFFIXES else key


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
