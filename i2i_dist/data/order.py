"""The order in which a domain's samples are drawn: a pure function of (seed, domain, position)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i2i_dist.draws import generator

_Ints = npt.NDArray[np.int64]


class _Epoch(NamedTuple):
    starts: _Ints  # [blocks] first sample of each block, in drawing order
    sizes: _Ints  # [blocks] samples in each block
    window_ends: _Ints  # [windows] samples drawn once the window is used up


class SampleOrder:
    """An endless, shuffled walk over one domain; every epoch visits each sample once.

    Samples that lie next to each other in a shard form blocks; an epoch permutes the blocks, and shuffles the samples
    inside each window of consecutive blocks. Reads stay within `window` runs of a shard at a time, and a data set of
    at most `window` blocks is shuffled entirely. Only the block order of an epoch and single windows are ever built, so
    any position is reached at once, at any size.
    """

    def __init__(self, counts: Sequence[int], seed: int, domain: str, block: int = 64, window: int = 128) -> None:
        """Prepare the order.

        Args:
            counts: Samples in each shard.
            seed: The run's seed.
            domain: Name of the domain; domains have independent orders.
            block: Adjacent samples of a shard that stay close to each other.
            window: Blocks whose samples are shuffled among each other.

        Raises:
            ValueError: `counts` holds no sample.
        """
        self.total = int(sum(counts))
        if self.total == 0:
            raise ValueError(f"The domain {domain!r} holds no samples, and at least one is needed.")
        self._seed, self._domain, self._window = seed, domain, window
        firsts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        starts = [np.arange(firsts[i], firsts[i + 1], block, dtype=np.int64) for i in range(len(counts))]
        ends = [np.minimum(s + block, firsts[i + 1]) for i, s in enumerate(starts)]
        self._starts: _Ints = np.concatenate(starts)
        self._sizes: _Ints = np.concatenate(ends) - self._starts
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)  # a micro-batch may touch the end of one and the next
        self._samples = lru_cache(maxsize=4)(self._build_window)

    def index(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample) for the domain's `position`-th draw; the sample counts through the shards."""
        epoch, place = divmod(position, self.total)
        ends = self._epoch(epoch).window_ends
        number = int(np.searchsorted(ends, place, side="right"))
        first = int(ends[number - 1]) if number else 0
        return epoch, int(self._samples(epoch, number)[place - first])

    def sample(self, place: int) -> int:
        """Return the sample of the domain's `place`-th draw."""
        return self.index(place)[1]

    def substitute(self, place: int, rng: np.random.Generator) -> int:
        """Draw a sample in the place of one that cannot be used: any of the domain."""
        return int(rng.integers(self.total))

    def _build_epoch(self, epoch: int) -> _Epoch:
        order = generator(self._seed, f"order.blocks.{self._domain}", epoch).permutation(len(self._starts))
        sizes = self._sizes[order]
        ends = np.cumsum(sizes)
        return _Epoch(self._starts[order], sizes, np.append(ends[self._window - 1 : -1 : self._window], ends[-1]))

    def _build_window(self, epoch: int, number: int) -> _Ints:
        blocks = slice(number * self._window, (number + 1) * self._window)
        table = self._epoch(epoch)
        runs = [np.arange(s, s + n) for s, n in zip(table.starts[blocks], table.sizes[blocks], strict=True)]
        shuffle = generator(self._seed, f"order.samples.{self._domain}", epoch, number)
        return shuffle.permutation(np.concatenate(runs))
