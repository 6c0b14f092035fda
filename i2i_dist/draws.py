"""Every random decision of training, as a pure function of (seed, purpose, position).

Nothing here keeps state, so the number of ranks, the number of workers and a resume change nothing: whoever asks for
the same purpose at the same position gets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the generator of one decision.

    Args:
        seed: The run's seed.
        purpose: What is drawn ("order", "crop", "patch_ids.down1", ...); two purposes never share numbers.
        key: Integers that place the decision: positions of samples, an epoch, an attempt.
    """
    place = (int(seed), purpose, *map(int, key))  # an integer of numpy has another repr
    digest = hashlib.blake2b(repr(place).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Draws(NamedTuple):
    """The draws of one update; a method asks it for patch positions, noise and the like.

    Attributes:
        seed: The run's seed.
        update_position: Global position of the update's first sample. What a batch shares (patch ids, a common flip) is
            keyed by it, so every rank and every micro-batch of the update draws the same.
    """

    seed: int
    update_position: int

    def patch_ids(self, purpose: str, locations: int, count: int) -> Tensor:
        """Draw `min(count, locations)` distinct locations out of `locations`, as int64 `[P]` on the CPU."""
        rng = generator(self.seed, f"patch_ids.{purpose}", self.update_position)
        return torch.from_numpy(rng.choice(locations, size=min(count, locations), replace=False, shuffle=False))

    def kept(self, purpose: str, positions: Tensor, shape: Sequence[int], rate: float) -> Tensor:
        """Draw what dropout keeps of one value of each sample: everything with probability `1 - rate`, independently.

        Args:
            purpose: Name of the place in the network.
            positions: int64 `[N]`, the global positions of the samples; each has a mask of its own.
            shape: Shape of a sample's value.
            rate: Share that is dropped.

        Returns:
            bool `[N, *shape]` on the CPU, so that every device drops the same.
        """
        rngs = [generator(self.seed, f"dropout.{purpose}", position) for position in positions.tolist()]
        return torch.from_numpy(np.stack([rng.random(shape, dtype=np.float32) >= rate for rng in rngs]))

    def normal(self, purpose: str, positions: Tensor, size: int) -> Tensor:
        """Draw `size` numbers from N(0, 1) for each sample.

        Args:
            purpose: What they are for.
            positions: int64 `[N]`, the global positions of the samples.
            size: How many.

        Returns:
            float32 `[N, size]` on the CPU, so that every device gets the same.
        """
        rngs = [generator(self.seed, f"normal.{purpose}", position) for position in positions.tolist()]
        return torch.from_numpy(np.stack([rng.standard_normal(size, dtype=np.float32) for rng in rngs]))

    def uniform(self, purpose: str, positions: Tensor) -> Tensor:
        """Draw a number from [0, 1) for each sample.

        Args:
            purpose: What it is for.
            positions: int64 `[N]`, the global positions of the samples.

        Returns:
            float32 `[N]` on the CPU.
        """
        rngs = [generator(self.seed, f"uniform.{purpose}", position) for position in positions.tolist()]
        return torch.tensor([rng.random(dtype=np.float32) for rng in rngs], dtype=torch.float32)

    def distinct(self, purpose: str, positions: Tensor, options: int, count: int) -> Tensor:
        """Draw `count` different numbers out of `options`, in random order, for each sample.

        Args:
            purpose: What they are for.
            positions: int64 `[N]`, the global positions of the samples.
            options: The numbers are 0 to `options - 1`.
            count: How many, at most `options`.

        Returns:
            int64 `[N, count]` on the CPU.
        """
        rngs = [generator(self.seed, f"distinct.{purpose}", position) for position in positions.tolist()]
        return torch.from_numpy(np.stack([rng.choice(options, size=count, replace=False) for rng in rngs]))

    def coin(self, purpose: str) -> bool:
        """Return True with probability 1/2."""
        return bool(generator(self.seed, f"coin.{purpose}", self.update_position).random() < 0.5)
