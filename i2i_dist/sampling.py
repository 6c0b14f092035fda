"""Sample grids: the same pictures of both domains, translated by the averaged generators as training goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from i2i_dist import styles
from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import decode_image
from i2i_dist.data.index import Source
from i2i_dist.data.labels import LabelSpace
from i2i_dist.data.transforms import resize
from i2i_dist.distributed import rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engine_state import persistent_buffers
from i2i_dist.engines import SideEngine
from i2i_dist.method import Attentive, Direction, Labelled, Method, Styled
from i2i_dist.telemetry.heat_maps import heat_map_pictures
from i2i_dist.telemetry.samples import write_grid

MOST_TARGETS = 16  # columns of translations into labels

_Row = tuple[str, Tensor]


def fixed_inputs(sources: Mapping[str, Source], count: int, size: int) -> dict[str, Tensor]:
    """Return the first `count` images that can be read as float [N, 3, size, size] in [-1, 1].

    Args:
        sources: One domain; or several whose samples of the same number belong together, of which one that cannot be
            read drops its partners too.
        count: How many of each.
        size: To which they are resized.

    Raises:
        ValueError: None can be read.
    """
    pictures: dict[str, list[Tensor]] = {domain: [] for domain in sources}
    total = min(sum(source.counts) for source in sources.values())
    found = 0
    for index in range(total):
        if found == count:
            break
        with contextlib.suppress(BadData):
            together = {domain: _picture(source, index, size) for domain, source in sources.items()}
            for domain, picture in together.items():
                pictures[domain].append(picture)
            found += 1
    if not found:
        names = " and ".join(source.name for source in sources.values())
        raise ValueError(f"none of the {total} images in {names} can be read")
    return {domain: torch.stack(images) for domain, images in pictures.items()}


def _picture(source: Source, index: int, size: int) -> Tensor:
    pixels = resize(decode_image(source.read(index)[1]), size, size)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1.0


def shown_labels(space: LabelSpace) -> npt.NDArray[np.uint8]:
    """Return the labels that grids show, uint8 [K, L] with K at most 16.

    They are all that are valid; or, where these are more, the first of them and for each attribute, in order, the one
    that has it and is else like the first.
    """
    if len(space.classes) <= MOST_TARGETS:
        return space.classes
    first = space.classes[0]
    labels = [first]
    for place in range(len(first)):
        label = first.copy()
        label[next((group for group in space.choices if place in group), [])] = 0
        label[place] = 1
        if not np.array_equal(label, first):
            labels.append(label)
    return np.stack(labels[:MOST_TARGETS])


class Sampler:
    """Writes sample grids. Every rank calls it; rank 0, which holds a plain replica of the method, draws them.

    For each direction there is a row of pictures and a row of their translations. Of paired methods the true partners
    stand between them; of `Attentive` ones a row below tells where they look; of `Styled` ones there is a row for the
    code of the partner, and one for each of some codes: those that `translate.py --samples` draws. Of `Labelled` ones
    each picture has a row, with its translation into each of `shown_labels`.
    """

    def __init__(
        self, replica: Method | None, side: SideEngine, ema: Ema, inputs: Mapping[str, Tensor], style_count: int
    ) -> None:
        """Prepare.

        Args:
            replica: On rank 0 the method, in which the averages are put.
            side: The generator's side that trains.
            ema: Its average.
            inputs: On rank 0 pictures of each domain, float [N, 3, H, W] in [-1, 1]; pairs where the method is paired.
            style_count: Codes to draw for methods that are `Styled`.
        """
        self._replica, self._side, self._ema, self._inputs = replica, side, ema, inputs
        self._style_count = style_count
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
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(replica, Labelled):
            write_grid(path, *self._labelled_rows(replica))
            return
        write_grid(path, [row for direction in replica.directions for row in self._rows(replica, direction)])

    def _rows(self, replica: Method, direction: Direction) -> list[_Row]:
        source, target = direction.split("_to_")
        paired = "paired" in replica.streams
        rows: list[_Row] = [(source.upper(), self._inputs[source])]
        if paired:
            rows.append((target.upper(), self._inputs[target]))
        if isinstance(replica, Styled):
            return rows + self._styled_rows(replica, source, target if paired and replica.encodes else None)
        label = f"{source.upper()} to {target.upper()}"
        if not isinstance(replica, Attentive):
            return [*rows, (label, self._each(lambda image: replica.translate(image, direction), source))]

        def attend(image: Tensor) -> Tensor:
            translated, maps = replica.attend(image, direction)
            size = image.shape[-2], image.shape[-1]
            return torch.cat([translated.float(), heat_map_pictures(maps, size, size)])

        both = self._each(attend, source)
        return [*rows, (label, both[0::2]), ("attention", both[1::2])]

    def _styled_rows(self, replica: Styled, source: str, partner: str | None) -> list[_Row]:
        rows: list[_Row] = []
        if partner is not None:

            def encoded(image: Tensor, true: Tensor) -> Tensor:
                return replica.translate_styled(image, replica.encode(true))

            rows.append(("encoded", self._each(encoded, source, partner)))
        for number, code in enumerate(styles.drawn(0, self._style_count, replica.style_dim), 1):
            codes = code[None].to(self._side.device)
            made = self._each(lambda image, codes=codes: replica.translate_styled(image, codes), source)
            rows.append((f"style {number}", made))
        return rows

    def _labelled_rows(self, replica: Labelled) -> tuple[list[_Row], list[str]]:
        """Return a row for each picture, and what stands above the columns."""
        heads, columns = ["source"], [self._inputs["a"]]
        for target in shown_labels(replica.label_space):
            labels = torch.from_numpy(target)[None].float().to(self._side.device)
            heads.append(replica.label_space.text(target.tolist()))
            columns.append(self._each(lambda image, labels=labels: replica.translate_labelled(image, labels), "a"))
        return [("", row) for row in torch.stack(columns, dim=1)], heads

    def _each(self, make: Callable[..., Tensor], *domains: str) -> Tensor:
        """Make pictures of each input, or inputs that belong together, and bring them to the CPU.

        One by one, so that a sheet never needs more memory than a training step.
        """
        made = []
        for images in zip(*(self._inputs[domain] for domain in domains), strict=True):
            with self._side.autocast():
                made.append(make(*(image[None].to(self._side.device) for image in images)).float().cpu())
        return torch.cat(made)
