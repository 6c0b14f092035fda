"""Reads which labels pictures have: CelebA's lists, RaFD's file names, and tables of comma-separated values."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from i2i_dist.data.labels import SampleLabels

RAFD_EMOTIONS = ("angry", "contemptuous", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")

_RAFD = re.compile(r"Rafd\d+_(\d+)_[A-Za-z]+_(?:male|female)_([a-z]+)_(?:frontal|left|right)", re.ASCII)
_VALUES = {"1": 1, "0": 0, "-1": 0, "": -1}  # as a table has them, and as they are kept
_PARTS = {"0": "train", "1": "val", "2": "test"}


class Rows(NamedTuple):
    """What a file says of pictures, by row.

    Attributes:
        path: The file.
        names: The pictures' names, each once.
        lines: The line that each row stands in, from 1.
    """

    path: Path
    names: list[str]
    lines: list[int]


def read_celeba(path: Path) -> tuple[Rows, SampleLabels]:
    """Read CelebA's `list_attr_celeba.txt`: the number of pictures, the attributes' names, and NAME 1 -1 ... for each.

    The files that MatchGAN's code makes of it have two columns more, which part of the data a picture is in and the
    number of its class; these are passed over.

    Raises:
        ValueError: The file is not such a list; the message names the line.
    """
    lines = iter(_lines(path))
    (count_line, count), (names_line, names) = next(lines, (1, "")), next(lines, (2, ""))
    if not count.strip().isdecimal():
        raise _error(path, count_line, f"holds {count.strip()!r}, and the number of pictures is expected")
    attributes = tuple(names.split())
    _check_attributes(path, names_line, attributes)
    found = _Found(path)
    values: list[list[int]] = []
    for line, text in lines:
        name, *cells = text.split()
        extra = cells[len(attributes) :]
        if len(cells) < len(attributes) or (extra and not (len(extra) == 2 and extra[0] in _PARTS)):
            raise _error(path, line, f"holds {len(cells)} values for {len(attributes)} attributes")
        wrong = [cell for cell in cells[: len(attributes)] if cell not in ("1", "-1")]
        if wrong:
            raise _error(path, line, f"holds the value {wrong[0]!r}; allowed are 1 and -1")
        found.add(name, line)
        values.append([_VALUES[cell] for cell in cells[: len(attributes)]])
    if int(count) != len(values):
        raise _error(path, count_line, f"says that there are {int(count)} pictures, but {len(values)} rows follow")
    return found.rows(), SampleLabels(attributes, _table(values, attributes))


def read_csv(path: Path) -> tuple[Rows, SampleLabels]:
    """Read a table: a row of headings, and for each picture its name, and for each attribute 1, 0 (or -1), or nothing.

    Nothing means that it is not known. What does not hold is written as 0 or as -1 in the whole file: where both
    stand, -1 might mean that something is not known.

    Raises:
        ValueError: The file is not such a table; the message names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table of comma-separated values in UTF-8: {error}") from None
    if not rows:
        raise _error(path, 1, "is empty, and a row of headings is expected")
    (first_line, headings), *rows = rows
    attributes = tuple(headings[1:])
    if any(attributes) and set(attributes) <= _VALUES.keys():
        raise _error(path, first_line, f"holds the values {', '.join(attributes)}, and a row of headings is expected")
    _check_attributes(path, first_line, attributes)
    found = _Found(path)
    values: list[list[int]] = []
    seen: dict[str, int] = {}  # values, and the lines that they stand in first
    for line, (name, *cells) in rows:
        if len(cells) != len(attributes):
            raise _error(path, line, f"holds {len(cells)} values for {len(attributes)} attributes")
        for attribute, cell in zip(attributes, cells, strict=True):
            if cell not in _VALUES:
                raise _error(path, line, f"gives {attribute} the value {cell!r}; allowed are 1, 0 or -1, and nothing")
            seen.setdefault(cell, line)
        found.add(name, line)
        values.append([_VALUES[cell] for cell in cells])
    if "0" in seen and "-1" in seen:
        line = max(seen["0"], seen["-1"])
        raise _error(
            path, line, "brings 0 beside -1; write 0 for what does not hold, and nothing for what is not known"
        )
    return found.rows(), SampleLabels(attributes, _table(values, attributes))


def read_partition(path: Path) -> tuple[Rows, list[str]]:
    """Read CelebA's `list_eval_partition.txt`: NAME and 0 for "train", 1 for "val" or 2 for "test", in each line.

    Raises:
        ValueError: The file is not such a list; the message names the line.
    """
    found = _Found(path)
    parts = []
    for line, text in _lines(path):
        name, *cells = text.split()
        if len(cells) != 1 or cells[0] not in _PARTS:
            raise _error(path, line, f"holds {text.strip()!r}; expected are a name and 0, 1 or 2 (train, val, test)")
        found.add(name, line)
        parts.append(_PARTS[cells[0]])
    return found.rows(), parts


def read_rafd(path: Path) -> tuple[int, str]:
    """Read the identity and the emotion in the name of a picture of RaFD.

    Raises:
        ValueError: The name is another.
    """
    match = _RAFD.fullmatch(path.stem)
    if match is None or match[2] not in RAFD_EMOTIONS:
        raise ValueError(
            f"{path} has not the name of a picture of RaFD, such as Rafd090_01_Caucasian_female_angry_frontal.jpg, "
            f"with one of {', '.join(RAFD_EMOTIONS)}; move it away, or give the labels with --labels-csv."
        )
    return int(match[1]), match[2]


class _Found:
    """Collects rows, and refuses a name that stands twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}

    def add(self, name: str, line: int) -> None:
        name = PurePosixPath(name).as_posix()  # "./a.png" is "a.png"
        if name in self._lines:
            raise _error(self._path, line, f"names {name!r}, as line {self._lines[name]} does; leave one of them")
        self._lines[name] = line

    def rows(self) -> Rows:
        return Rows(self._path, list(self._lines), list(self._lines.values()))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
    yield from ((number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


def _check_attributes(path: Path, line: int, attributes: Sequence[str]) -> None:
    if not attributes:
        raise _error(path, line, "should name the attributes, and names none")
    if "" in attributes:
        raise _error(path, line, f"has no heading for the column {attributes.index('') + 2}")
    twice = sorted({name for name in attributes if attributes.count(name) > 1})
    if twice:
        raise _error(path, line, f"names {', '.join(twice)} twice")


def _table(
    values: Sequence[Sequence[int]], attributes: Sequence[str]
) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    return np.array(values, dtype=np.int8).reshape(len(values), len(attributes))


def _error(path: Path, line: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {line}, {what}.")
