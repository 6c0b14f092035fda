"""From global positions to micro-batches: reading, replacing broken samples, and spreading work over workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from i2i_dist.data.batch import BadData, BadSample, HostBatch
from i2i_dist.data.decode import decode_image
from i2i_dist.data.index import Source
from i2i_dist.data.labels import LabelledSet
from i2i_dist.data.order import SampleOrder
from i2i_dist.data.transforms import Transform
from i2i_dist.data.workers import Item, loaded
from i2i_dist.draws import generator

MAX_ATTEMPTS = 100  # failures in a row that mean the data set is broken, not a sample


class Reader:
    """Reads all domains at the same positions.

    Unpaired, each domain has its own order, crops and flips, and wraps around on its own, so domains of different sizes
    meet in ever new pairs. Paired, samples of the same number belong together: they share the order, the crop and the
    flip, and where one of them cannot be used the whole pair is replaced. Of one domain with labels, streams visit
    different samples in orders of their own, and one that cannot be used is replaced by one of the same stream, and
    where the stream has groups of the same class.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        seed: int,
        transform: Transform,
        streams: Sequence[str] = ("unpaired",),
        labelled: LabelledSet | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            sources: For each domain ("a", "b") where its samples are.
            seed: The run's seed.
            transform: What turns a decoded image into a training picture.
            streams: What feeds one update after the other, over and over: of pairs (see `i2i_dist.data.pairs`)
                "paired"; of one domain with labels "labelled" and "unlabelled".
            labelled: The labels of one domain, for the streams that are made of them.

        Raises:
            ValueError: A source holds no sample, or a stream none.
        """
        self.streams = tuple(streams)
        self._sources, self._labelled = dict(sources), labelled
        self._groups: dict[str, list[_Group]] = {}
        for stream in streams:
            if labelled is not None:
                self._groups[stream] = [_Group("a", ["a"], labelled.order(stream))]
                continue
            together = {"pair": list(sources)} if stream == "paired" else {domain: [domain] for domain in sources}
            self._groups[stream] = [
                _Group(name, domains, SampleOrder(sources[domains[0]].counts, seed, name))
                for name, domains in together.items()
            ]
        self._seed = seed
        self._transform = transform

    def read(
        self, positions: range, update_position: int, stream: str | None = None, place: int | None = None
    ) -> HostBatch:
        """Read the samples of some global positions.

        Args:
            positions: Global positions, one for each sample.
            update_position: Global position of the update's first sample.
            stream: The stream that they are drawn from; None for the only one.
            place: How many samples that stream has given before the first of them; None for as many as its position.

        Returns:
            The micro-batch, a pure function of the data set, the seed and the arguments. A sample that cannot be used
            is replaced by another one of its domain, a pair by another pair, drawn from (seed, position, attempt), and
            listed in `bad`.

        Raises:
            ValueError: `MAX_ATTEMPTS` samples in a row could not be used.
        """
        stream = self.streams[0] if stream is None else stream
        first = positions.start if place is None else place
        side = self._transform.crop_size
        bad: list[BadSample] = []
        images = {domain: np.empty((len(positions), side, side, 3), dtype=np.uint8) for domain in self._sources}
        keys: dict[str, list[str]] = {domain: [] for domain in self._sources}
        samples: list[int] = []
        for group in self._groups[stream]:
            for row, position in enumerate(positions):
                sample, usable = self._usable_images(group, position, first + row, bad)
                samples.append(sample)
                for domain, image in usable.items():
                    picture = self._transform(image, seed=self._seed, draw=group.name, position=position)
                    images[domain][row] = picture
                    keys[domain].append(self._sources[domain].keys[sample])
        pixels = {domain: torch.from_numpy(stack) for domain, stack in images.items()}
        batch = HostBatch(pixels, torch.tensor(positions, dtype=torch.int64), update_position, tuple(bad), keys)
        if self._labelled is None or stream != "labelled":
            return batch
        labels = np.stack([self._labelled.label(sample) for sample in samples])
        others = np.stack([self._labelled.another(position) for position in positions])
        return batch._replace(labels=torch.from_numpy(labels), others=torch.from_numpy(others))

    def _usable_images(
        self, group: _Group, position: int, place: int, bad: list[BadSample]
    ) -> tuple[int, dict[str, npt.NDArray[np.uint8]]]:
        index = group.order.sample(place)
        failures: list[BadSample] = []
        while len(failures) < MAX_ATTEMPTS:
            images: dict[str, npt.NDArray[np.uint8]] = {}
            for domain in group.domains:
                source = self._sources[domain]
                try:
                    images[domain] = decode_image(source.read(index)[1])
                except BadData as error:
                    failures.append(BadSample(domain, source.keys[index], str(error), position))
                    break
            if len(images) == len(group.domains):
                bad += dict.fromkeys(failures)  # a substitute may be the broken sample again
                return index, images
            rng = generator(self._seed, f"substitute.{group.name}", position, len(failures))
            index = group.order.substitute(place, rng)
        reasons = "\n".join(f"  {sample.key}: {sample.reason}" for sample in list(dict.fromkeys(failures))[-5:])
        where = " and ".join(f"{domain!r} ({self._sources[domain].name})" for domain in group.domains)
        raise ValueError(
            f"{MAX_ATTEMPTS} samples in a row of domain {where} could not be used, at position {position}. The last "
            f"ones:\n{reasons}\nRestore the data set, or pack it again with launchers/pack.py, which leaves out what "
            "cannot be read."
        )


class _Order(Protocol):
    """The order in which samples are drawn."""

    def sample(self, place: int) -> int: ...
    def substitute(self, place: int, rng: np.random.Generator) -> int: ...


class _Group(NamedTuple):
    """Domains whose samples are drawn together; the draws carry the group's name."""

    name: str
    domains: list[str]
    order: _Order


class _MicroBatches(Dataset[Item]):
    """The micro-batches of one rank, by number."""

    def __init__(
        self, reader: Reader, global_batch: int, micro_batch: int, rank: int, world: int, start: int, stop: int
    ) -> None:
        self._reader, self._micro, self._global, self._start = reader, micro_batch, global_batch, start
        self._share = global_batch // world
        self._first = rank * self._share
        self._count = (stop - start) // global_batch * (self._share // micro_batch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Item:
        update, part = divmod(number, self._share // self._micro)
        update_position = self._start + update * self._global
        first = self._first + part * self._micro
        streams = self._reader.streams
        turn, stream = divmod(update_position // self._global, len(streams))
        positions = range(update_position + first, update_position + first + self._micro)
        try:
            return self._reader.read(positions, update_position, streams[stream], turn * self._global + first)
        except ValueError as error:
            return str(error)  # torch would bury an exception of a worker under a traceback


def micro_batches(
    reader: Reader,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start: int,
    stop: int,
    workers: int,
    worker_timeout_seconds: float = 180.0,
    restarted: Callable[[], None] = lambda: None,
) -> Iterator[HostBatch]:
    """Yield one rank's micro-batches, `global_batch / world / micro_batch` for each update, in order.

    Update u covers the global positions `[u * global_batch, (u + 1) * global_batch)`; the rank takes a contiguous share
    of each. Every rank gets the same number, whatever the size of the data set, and what all ranks together get does
    not depend on their number.

    Args:
        reader: What reads the samples.
        global_batch: Images of a domain in one update, over all ranks; a multiple of `world * micro_batch`.
        micro_batch: Images of a domain in one micro-batch.
        rank: This rank.
        world: Number of ranks.
        start: Images seen so far, a multiple of `global_batch`.
        stop: Images seen at the end, a multiple of `global_batch`.
        workers: Processes that read ahead; 0 reads in this process. They change nothing in what is yielded, even where
            they are killed or hang: see `i2i_dist.data.workers`.
        worker_timeout_seconds: How long a micro-batch may take a worker before it counts as hanging.
        restarted: Called each time that the workers are replaced.

    Raises:
        ValueError: The sizes do not fit together, too many samples in a row are broken, or the workers are lost again
            and again.
    """
    if global_batch % (world * micro_batch):
        raise ValueError(
            f"The global batch of {global_batch} cannot be split into micro-batches of {micro_batch} on {world} ranks; "
            f"it must be a multiple of {world * micro_batch}: change the global batch, the micro-batch or the ranks."
        )
    if start % global_batch or stop % global_batch:
        raise ValueError(
            f"Training goes from {start} to {stop} images, and both must be multiples of the global batch of "
            f"{global_batch}: change the global batch or the number of images."
        )
    numbered = _MicroBatches(reader, global_batch, micro_batch, rank, world, start, stop)
    if workers == 0:
        return _checked(numbered[number] for number in range(len(numbered)))
    return _checked(loaded(numbered, workers, worker_timeout_seconds, restarted))


def _checked(items: Iterator[Item]) -> Iterator[HostBatch]:
    for item in items:
        if isinstance(item, str):
            raise ValueError(item)
        yield item
