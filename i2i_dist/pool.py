"""The image pool: what the discriminator is shown is now and then an older fake (Shrivastava et al., 2017)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from i2i_dist.draws import generator

_log = logging.getLogger("i2i_dist.pool")


class ImagePools:
    """One pool of at most `size` images for each named field. A pool belongs to its rank.

    While a pool is not full every new image is stored and returned. Once full, each new image is, with probability
    1/2, exchanged for a stored one drawn at random, and otherwise returned as it is. Both draws are pure functions of
    (seed, field, position of the sample).
    """

    def __init__(self, fields: tuple[str, ...], size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.images: dict[str, list[Tensor]] = {field: [] for field in fields if size}

    def exchange(self, outputs: Any, positions: Tensor) -> Any:
        """Return the NamedTuple `outputs` with its pooled fields [N, C, H, W] gone through their pools."""
        if not self.size:
            return outputs
        return outputs._replace(
            **{field: self._exchange(field, getattr(outputs, field), positions.tolist()) for field in self.images}
        )

    def _exchange(self, field: str, images: Tensor, positions: list[int]) -> Tensor:
        shown, stored = [], self.images[field]
        if stored and stored[0].shape != images.shape[1:]:
            _log.warning("The image pool of %s starts empty: its pictures had another size.", field)
            stored.clear()
        for image, position in zip(images.detach(), positions, strict=True):
            draw = generator(self.seed, f"pool.{field}", position)
            if len(stored) < self.size:
                stored.append(image.clone())
                shown.append(image)
            elif draw.random() < 0.5:
                slot = int(draw.integers(self.size))
                shown.append(stored[slot])
                stored[slot] = image.clone()
            else:
                shown.append(image)
        return torch.stack(shown)

    def state(self) -> dict[str, Tensor]:
        """Return the stored images, one tensor [K, C, H, W] for each field that holds any."""
        return {field: torch.stack(images) for field, images in self.images.items() if images}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take back what `state` returned."""
        for field in self.images:
            self.images[field] = list(state[field].to(device)) if field in state else []
