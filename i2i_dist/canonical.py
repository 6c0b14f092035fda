"""Files in the safetensors format that many ranks write at once and any rank reads in parts.

The header follows from names, shapes and dtypes, which every rank knows, so each rank writes its own byte ranges into
the one file (on a file system that all ranks share) and nothing is gathered.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from i2i_dist.engine_state import Piece

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bytes, dict[str, int], int]:
    """Return the file's first bytes, the offset in the file of each tensor, and the size of the whole file."""
    entries, offsets, end = {}, {}, 0
    for key, (shape, dtype) in tensors.items():
        offsets[key] = end
        end += math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[key], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {key: base + offset for key, offset in offsets.items()}, base + end


def file_bytes(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return the size of the file that `create` makes for these tensors."""
    return _header(tensors)[2]


def create(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Write the header and give the file its full size. One rank does this, before any calls `write_pieces`."""
    header, _, size = _header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


def write_pieces(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], pieces: Mapping[str, Piece]
) -> None:
    """Write this rank's pieces into the file that `create` made for the same `tensors`, down to the disk."""
    _, offsets, _ = _header(tensors)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for key, (start, values) in pieces.items():
            values = values.detach().cpu().contiguous()
            rest = memoryview(values.view(torch.uint8).numpy().data)
            at = offsets[key] + start * values.element_size()
            while len(rest):
                written = os.pwrite(descriptor, rest, at)
                rest, at = rest[written:], at + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CanonicalFile:
    """Reads runs of elements out of such a file; `scalars` are the optimizer's numbers that stand in JSON beside it."""

    def __init__(self, path: Path, scalars: Mapping[str, float]) -> None:
        self.scalars = scalars
        self._path = path
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._entries = json.loads(file.read(length))
        self._entries.pop("__metadata__", None)
        self._base = 8 + length

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every tensor."""
        return {key: tuple(entry["shape"]) for key, entry in self._entries.items()}

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Return elements `start ... start + length` of a tensor, 1-D; only their bytes are read."""
        entry = self._entries[key]
        dtype = _DTYPES[entry["dtype"]]
        if not length:
            return torch.empty(0, dtype=dtype)
        offset = self._base + entry["data_offsets"][0] + start * dtype.itemsize
        return torch.from_numpy(np.fromfile(self._path, np.uint8, length * dtype.itemsize, offset=offset)).view(dtype)

    def whole(self, key: str) -> Tensor:
        """Return a tensor in its own shape."""
        shape = tuple(self._entries[key]["shape"])
        return self.read(key, 0, math.prod(shape)).view(shape)
