"""Sample grids: the same pictures of both domains, translated by the averaged generators as training goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import decode_image
from i2i_dist.data.index import Source
from i2i_dist.data.transforms import resize
from i2i_dist.distributed import rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engine_state import persistent_buffers
from i2i_dist.engines import SideEngine
from i2i_dist.method import Method
from i2i_dist.telemetry.samples import write_grid


def fixed_inputs(sources: Mapping[str, Source], count: int, size: int) -> dict[str, Tensor]:
    """Return the first `count` readable images of each domain as float [N, 3, size, size] in [-1, 1].

    Raises:
        ValueError: No image of a domain can be read.
    """
    inputs = {}
    for domain, source in sources.items():
        pictures: list[Tensor] = []
        for index in range(sum(source.counts)):
            if len(pictures) == count:
                break
            with contextlib.suppress(BadData):
                pixels = resize(decode_image(source.read(index)[1]), size, size)
                pictures.append(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1.0)
        if not pictures:
            raise ValueError(f"none of the {sum(source.counts)} images in {source.name} can be read")
        inputs[domain] = torch.stack(pictures)
    return inputs


class Sampler:
    """Writes sample grids. Every rank calls it; rank 0, which holds a plain replica of the method, draws them."""

    def __init__(self, replica: Method | None, side: SideEngine, ema: Ema, inputs: Mapping[str, Tensor]) -> None:
        self._replica, self._side, self._ema, self._inputs = replica, side, ema, inputs
        if replica is not None:
            replica.generator.to(side.device).eval()

    @torch.no_grad()
    def write(self, path: Path) -> None:
        """Translate the fixed inputs and write the sheet to `path`. Collective."""
        replica = self._replica
        self._ema.load_into(replica.generator if replica is not None else None)
        if replica is None:
            return
        assert rank_and_world()[0] == 0
        live = persistent_buffers(self._side.module)
        for name, buffer in persistent_buffers(replica.generator).items():
            buffer.copy_(live[name])
        rows = []
        for direction in replica.directions:
            source, target = direction.split("_to_")
            inputs = self._inputs[source].to(self._side.device)
            with self._side.autocast():
                # One by one, so that a sheet never needs more memory than a training step.
                outputs = [replica.translate(image[None], direction).float() for image in inputs]
            rows += [(source.upper(), inputs), (f"{source.upper()} to {target.upper()}", torch.cat(outputs))]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_grid(path, rows)
