"""Sources of encoded images, and the index that makes the samples of tar shards addressable one by one."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from i2i_dist.data import label_member
from i2i_dist.data.batch import BadData
from i2i_dist.data.labels import SampleLabels
from i2i_dist.data.tar import Scan, scan_shard

INDEX_NAME = "index.npz"
_FORMAT = 1
_OPEN_SHARDS = 128  # per source and process; the usual limit is 1024 open files
_log = logging.getLogger("i2i_dist.data")


class Source(Protocol):
    """One domain of a data set: encoded images, addressable by number.

    Attributes:
        name: The domain's folder, such as "trainA".
        counts: Samples in each shard; a folder of images is one shard.
        keys: The samples' names, unique within the source.
        fingerprint: sha256 over the listing of the content, in hexadecimal.
        labels: What is known of the samples, where something is.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def counts(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def keys(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def labels(self) -> SampleLabels | None: ...  # noqa: D102

    def read(self, index: int) -> tuple[str, bytes]:
        """Return (key, encoded image) of a sample; raises `BadData` if it is cut, changed or cannot be read."""
        ...


class Keys(Sequence[str]):
    """Millions of strings in one array of bytes; in a list they would take several times the memory."""

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        """Wrap UTF-8 text and the position at which each key ends in it."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> Keys:
        """Pack strings."""
        encoded = [key.encode() for key in keys]
        ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return self.text[start : int(self.ends[index])].tobytes().decode()


@dataclass(frozen=True)
class Index:
    """The content of one domain's shards.

    Attributes:
        shards: File names, sorted.
        shard_sizes: int64 `[shards]`, bytes of each file when it was indexed.
        counts: int64 `[shards]`, samples in each.
        damage: For each shard what was wrong with it when it was indexed, or "".
        offsets: int64 `[samples]`, where an image begins in its shard.
        sizes: int64 `[samples]`, its bytes.
        crcs: uint32 `[samples]`, its CRC-32.
        keys: The samples' names.
        labels: What is known of the samples; None where no shard holds labels.
    """

    shards: tuple[str, ...]
    shard_sizes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    damage: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    crcs: npt.NDArray[np.uint32]
    keys: Keys
    labels: SampleLabels | None = None

    def fingerprint(self) -> str:
        """Return the sha256 over keys, sizes, checksums, their division into shards, and labels if there are some."""
        digest = hashlib.sha256(self.keys.text.tobytes())
        for numbers in (self.keys.ends, self.sizes, self.crcs, self.counts):
            digest.update(numbers.tobytes())
        if self.labels is not None:
            digest.update(repr(self.labels.attributes).encode() + self.labels.values.tobytes())
        return digest.hexdigest()


def build_index(shards: Sequence[Path]) -> Index:
    """Scan shards, reading every byte once; see `scan_shard` for what is accepted.

    Keys that occur in several shards are prefixed with the shard's name.

    Raises:
        ValueError: A shard holds what no data set should, or labels of other attributes than another shard.
    """
    scans: list[Scan] = [scan_shard(shard) for shard in shards]
    samples = [sample for scan in scans for sample in scan.samples]
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        keys = [f"{shard.stem}/{s.key}" for shard, scan in zip(shards, scans, strict=True) for s in scan.samples]
    return Index(
        shards=tuple(shard.name for shard in shards),
        shard_sizes=np.array([scan.size for scan in scans], dtype=np.int64),
        counts=np.array([len(scan.samples) for scan in scans], dtype=np.int64),
        damage=tuple(scan.damage for scan in scans),
        offsets=np.array([sample.offset for sample in samples], dtype=np.int64),
        sizes=np.array([sample.size for sample in samples], dtype=np.int64),
        crcs=np.array([sample.crc for sample in samples], dtype=np.uint32),
        keys=Keys.of(keys),
        labels=_labels(shards, scans),
    )


def _labels(shards: Sequence[Path], scans: Sequence[Scan]) -> SampleLabels | None:
    """Put together what the shards say of their samples; all of which nothing is said is not known."""
    labelled = [(shard, scan.attributes) for shard, scan in zip(shards, scans, strict=True) if scan.attributes]
    if not labelled:
        return None
    first, attributes = labelled[0]
    for shard, others in labelled:
        if others != attributes:
            raise ValueError(
                f"The shard {shard} holds labels of other attributes than {first.name} "
                f"({label_member.other_attributes(others, attributes)}); one domain has the same everywhere: pack the "
                "data again with launchers/pack.py."
            )
    unknown = b"\xff" * len(attributes)
    rows = b"".join(unknown if s.labels is None else s.labels for scan in scans for s in scan.samples)
    return SampleLabels(attributes, np.frombuffer(rows, dtype=np.int8).reshape(-1, len(attributes)))


def save_index(index: Index, path: Path) -> None:
    """Write an index atomically; ranks that do so at the same time replace one another's equal files."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    labels: dict[str, Any] = {}
    if index.labels is not None:
        labels = {"attributes": np.array(index.labels.attributes), "labels": index.labels.values}
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                shards=np.array(index.shards),
                shard_sizes=index.shard_sizes,
                counts=index.counts,
                damage=np.array(index.damage),
                offsets=index.offsets,
                sizes=index.sizes,
                crcs=index.crcs,
                key_text=index.keys.text,
                key_ends=index.keys.ends,
                **labels,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_index(path: Path) -> Index:
    """Read an index.

    Raises:
        ValueError: The file is damaged or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            if int(stored["format"]) != _FORMAT:
                raise ValueError(f"format {int(stored['format'])} instead of {_FORMAT}")
            labels = None
            if "labels" in stored:
                labels = SampleLabels(tuple(stored["attributes"].tolist()), stored["labels"])
            index = Index(
                shards=tuple(stored["shards"].tolist()),
                shard_sizes=stored["shard_sizes"],
                counts=stored["counts"],
                damage=tuple(stored["damage"].tolist()),
                offsets=stored["offsets"],
                sizes=stored["sizes"],
                crcs=stored["crcs"],
                keys=Keys(stored["key_text"], stored["key_ends"]),
                labels=labels,
            )
        if {len(index.offsets), len(index.sizes), len(index.crcs), len(index.keys)} != {int(index.counts.sum())}:
            raise ValueError("its tables differ in length")
        if labels is not None and labels.values.shape != (len(index.keys), len(labels.attributes)):
            raise ValueError("its labels differ in number from its samples")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The index {path} cannot be used ({error}). Delete it, and it is built again from the shards."
        ) from error
    return index


class ShardSource:
    """The images of a folder of tar shards."""

    def __init__(self, folder: Path, name: str, index: Index) -> None:
        """Read `index.shards` inside `folder`."""
        self.name = name
        self.counts: Sequence[int] = index.counts.tolist()
        self.keys: Sequence[str] = index.keys
        self.fingerprint = index.fingerprint()
        self.labels = index.labels
        self._folder, self._index = folder, index
        self._firsts = [0, *accumulate(self.counts)]
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, index: int) -> tuple[str, bytes]:
        """Return (key, encoded image) of a sample; raises `BadData` if it is cut, changed or cannot be read."""
        shard = bisect_right(self._firsts, index) - 1
        size, offset = int(self._index.sizes[index]), int(self._index.offsets[index])
        where = self._index.shards[shard]
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise BadData(f"{where} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise BadData(f"{where} is cut: {len(data)} of {size} bytes at byte {offset}")
        if zlib.crc32(data) != self._index.crcs[index]:
            raise BadData(f"{where} has changed at byte {offset}: the checksum differs from the index")
        return self.keys[index], data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= _OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._folder / self._index.shards[shard], os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


def open_shards(folder: Path, name: str) -> ShardSource:
    """Open a folder of tar shards, building the index first where there is none.

    Shards that are damaged or have changed are named in a warning; what cannot be read is replaced while training.

    Raises:
        ValueError: The index does not belong to the shards, or a shard holds what no data set should.
    """
    shards = sorted(folder.glob("*.tar"))
    stored = folder / INDEX_NAME
    if stored.exists():
        index = load_index(stored)
        _compare(index, shards, folder)
    else:
        _log.info("Indexing %d shards in %s; this happens once.", len(shards), folder)
        index = build_index(shards)
        try:
            save_index(index, stored)
        except OSError as error:
            _log.warning(
                "The index %s cannot be written (%s), so it is kept in memory and built again at every start.",
                stored,
                error.strerror,
            )
    for shard, damage, count in zip(index.shards, index.damage, index.counts, strict=True):
        if damage:
            _log.warning(
                "The shard %s is damaged: %s. The %d samples before that are used; restore the shard and delete %s to "
                "use the others.",
                folder / shard,
                damage,
                count,
                stored,
            )
    return ShardSource(folder, name, index)


def _compare(index: Index, shards: Sequence[Path], folder: Path) -> None:
    found = {shard.name for shard in shards}
    differing = sorted(found.symmetric_difference(index.shards))
    if differing:
        raise ValueError(
            f"The index {folder / INDEX_NAME} and the shards beside it do not belong together: "
            f"{_listed(differing, found)}. Restore the shards, or delete the index to use what is there."
        )
    firsts = [0, *accumulate(index.counts.tolist())]
    for number, shard in enumerate(shards):
        size, expected = shard.stat().st_size, int(index.shard_sizes[number])
        if size != expected:
            own = slice(firsts[number], firsts[number + 1])
            lost = int(np.count_nonzero(index.offsets[own] + index.sizes[own] > size))
            _log.warning(
                "The shard %s has %d bytes, but %d when it was indexed: %d of its %d samples lie beyond its end and "
                "are replaced while training. Restore the shard, or delete %s to index it as it is.",
                shard,
                size,
                expected,
                lost,
                own.stop - own.start,
                folder / INDEX_NAME,
            )


def _listed(names: Sequence[str], found: set[str]) -> str:
    shown = [f"{name} {'is not in the index' if name in found else 'is missing'}" for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
