"""Finds the images of a WebDataset shard by walking over the tar headers, and says where a shard is damaged."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from i2i_dist.data import label_member
from i2i_dist.data.decode import IMAGE_SUFFIXES

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_NAME_RECORD = 1 << 20  # bytes of a long-name or pax record; real ones hold a path

_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"K": "a link with a long name",
    b"S": "a sparse file",
}
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # WebDataset's rule: the key ends at the first dot


class Sample(NamedTuple):
    """One image inside a shard: its key, where its bytes are, and its labels.

    Attributes:
        labels: As bytes, int8 for each of the shard's attributes: 1, 0, or -1 where it is not known; None for nothing
            being known at all.
    """

    key: str
    offset: int
    size: int
    crc: int
    labels: bytes | None = None


class Scan(NamedTuple):
    """What a shard holds.

    Attributes:
        size: Bytes of the file.
        samples: The images, in the order of the shard.
        damage: A clause that says what is wrong and at which byte, or "".
        attributes: What the labels are of, sorted; () where no sample has any.
    """

    size: int
    samples: list[Sample]
    damage: str
    attributes: tuple[str, ...] = ()


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class _DamageError(Exception):
    """The rest of the shard cannot be read; the message is a clause with the byte."""


def scan_shard(path: Path) -> Scan:
    """List the images of a shard, with the checksum of each.

    Reads ustar, GNU and pax tar files as WebDataset writes and reads them: adjacent members with the same name up to
    the first dot of the base name form a sample, one of them is its image, another may be its labels (see
    `i2i_dist.data.label_member`), and the others are ignored. Whatever stands before a damaged place is used.

    Raises:
        ValueError: The shard holds something that no data set should: links, devices, sparse files, names that lead
            out of the folder, a key twice, two images under one key, labels that are not valid or of other attributes
            than those before.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        found = _Samples(path)
        damage = ""
        try:
            for member in _members(descriptor, size, path):
                found.add(descriptor, member)
        except _DamageError as error:
            damage = str(error)
        return Scan(size, found.samples, damage, found.attributes)
    finally:
        os.close(descriptor)


class _Samples:
    """The samples of a shard, put together from its members."""

    def __init__(self, path: Path) -> None:
        self.samples: list[Sample] = []
        self.attributes: tuple[str, ...] = ()
        self._path = path
        self._seen: set[str] = set()
        self._key, self._has_image = "", False
        self._labels: bytes | None = None

    def add(self, descriptor: int, member: _Member) -> None:
        match = _KEY.fullmatch(member.name)
        if match is None:
            return  # WebDataset skips names without a key, too
        key, suffix = match.groups()
        if key != self._key:
            self._begin(key)
        if suffix.lower() == label_member.SUFFIX:
            self._add_labels(descriptor, member)
        elif suffix.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
            self._add_image(descriptor, member)

    def _begin(self, key: str) -> None:
        if key in self._seen:
            raise ValueError(
                f"The shard {self._path} holds the key {key!r} in two places. Keys must be unique within a shard, and "
                "the members of a sample adjacent: pack the data again with launchers/pack.py."
            )
        self._seen.add(key)
        self._key, self._has_image, self._labels = key, False, None

    def _add_image(self, descriptor: int, member: _Member) -> None:
        if self._has_image:
            raise ValueError(
                f"The shard {self._path} holds a second image, {member.name!r}, under the key {self._key!r}; a sample "
                "is one image, and a key ends at the first dot: pack the data again with launchers/pack.py."
            )
        self._has_image = True
        crc = _checksum(descriptor, member)
        self.samples.append(Sample(self._key, member.offset, member.size, crc, self._labels))

    def _add_labels(self, descriptor: int, member: _Member) -> None:
        """Take a sample's labels, which stand before its image or after it."""
        try:
            if self._labels is not None:
                raise ValueError("is the second of its key")
            if member.size > label_member.MAX_BYTES:
                raise ValueError(f"has {member.size} bytes, and labels have at most {label_member.MAX_BYTES}")
            labels = label_member.decode_labels(os.pread(descriptor, member.size, member.offset))
            attributes = tuple(labels)
            if self.attributes and attributes != self.attributes:
                others = label_member.other_attributes(attributes, self.attributes)
                raise ValueError(f"names other attributes than the samples before it: {others}")
        except ValueError as error:
            raise ValueError(
                f"The shard {self._path} holds {member.name!r}, which {error}. Pack the data again with "
                "launchers/pack.py, or leave such members out."
            ) from None
        self.attributes = attributes
        self._labels = np.array(list(labels.values()), dtype=np.int8).tobytes()
        if self._has_image:
            self.samples[-1] = self.samples[-1]._replace(labels=self._labels)


def _checksum(descriptor: int, member: _Member) -> int:
    crc = 0
    for start in range(0, member.size, _CHUNK):
        crc = zlib.crc32(os.pread(descriptor, min(_CHUNK, member.size - start), member.offset + start), crc)
    return crc


def _members(descriptor: int, size: int, path: Path) -> Iterator[_Member]:
    """Yield the regular members; extended headers are folded into the member they describe."""
    offset = 0
    extended: dict[str, str] = {}
    while offset < size:
        header = os.pread(descriptor, _BLOCK, offset)
        if len(header) < _BLOCK:
            raise _DamageError(f"it is cut inside the header at byte {offset}")
        if not any(header):
            return _expect_zeros(descriptor, offset, size)
        _verify_checksum(header, offset)
        kind = header[156:157]
        length = _number(header[124:136], offset)
        if kind in (b"0", b"\0", b"7"):
            length = int(extended.get("size", length))
        data, offset = offset + _BLOCK, offset + _BLOCK + -(-length // _BLOCK) * _BLOCK
        name = extended.get("path") or _name(header)
        if data + length > size:
            raise _DamageError(f"it ends at byte {size}, inside {name!r}, which begins at byte {data - _BLOCK}")
        if kind in (b"x", b"L"):
            extended |= _extended(descriptor, kind, data, length)
            continue
        _refuse(path, name, kind, extended)
        if kind not in (b"5", b"g"):
            yield _Member(name, data, length)
        extended = {}
    raise _DamageError(f"it ends at byte {size} without an end marker")


def _expect_zeros(descriptor: int, offset: int, size: int) -> None:
    for start in range(offset, size, _CHUNK):
        if any(os.pread(descriptor, min(_CHUNK, size - start), start)):
            raise _DamageError(f"it has an end marker at byte {offset}, but other data after it")


def _verify_checksum(header: bytes, offset: int) -> None:
    expected = _number(header[148:156], offset)
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:  # the field itself counts as spaces
        raise _DamageError(f"the header at byte {offset} is not a valid tar header")


def _number(field: bytes, offset: int) -> int:
    if field[0] == 0x80:  # GNU's binary form, for what does not fit into octal digits
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise _DamageError(f"the header at byte {offset} is not a valid tar header")
    return value


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0")[0])
    prefix = _text(header[345:500].split(b"\0")[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _extended(descriptor: int, kind: bytes, offset: int, length: int) -> dict[str, str]:
    """Read what an extended header says about the next member: pax records, or GNU's long name."""
    if length > _MAX_NAME_RECORD:
        raise _DamageError(f"the extended header before byte {offset} claims {length} bytes")
    content = os.pread(descriptor, length, offset)
    if kind == b"L":
        return {"path": _text(content.rstrip(b"\0"))}
    records: dict[str, str] = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(content):
            raise _DamageError(f"the extended header before byte {offset} is damaged")
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        content = content[int(digits) :]
    if not records.get("size", "0").isdecimal():
        raise _DamageError(f"the extended header before byte {offset} is damaged")
    return records


def _refuse(path: Path, name: str, kind: bytes, extended: dict[str, str]) -> None:
    what = _REFUSED.get(kind)
    if any(key.startswith("GNU.sparse.") for key in extended):
        what = _REFUSED[b"S"]
    if what is None and kind not in (b"0", b"\0", b"7", b"5", b"g"):
        what = f"a member of the unknown type {kind!r}"
    if what is not None:
        raise ValueError(f"The shard {path} holds {what}, {name!r}; only plain files are allowed: pack the data again.")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(
            f"The shard {path} holds the name {name!r}, which leads out of its folder; names must be relative and "
            "without '..': pack the data again."
        )
