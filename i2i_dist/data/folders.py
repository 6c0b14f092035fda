"""Opens a domain of a data set: tar shards if there are any, else a folder of images of any depth."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import IMAGE_SUFFIXES
from i2i_dist.data.index import Source, open_shards
from i2i_dist.data.labels import SampleLabels

_SHOWN_FOLDERS = 20


class FolderSource:
    """The images of a folder, in the order of their paths; keys are the paths below it."""

    counts: Sequence[int]
    keys: Sequence[str]
    labels: SampleLabels | None = None  # those of files are packed into shards first

    def __init__(self, folder: Path, name: str, paths: Sequence[Path]) -> None:
        """Read `paths`, which lie inside `folder`.

        The fingerprint covers paths and sizes, not the content: that would have to be read at every start.
        """
        self.name = name
        self.keys = [path.relative_to(folder).as_posix() for path in paths]
        self.counts = [len(paths)]
        self._paths = paths
        self._sizes = [path.stat().st_size for path in paths]
        listing = repr(list(zip(self.keys, self._sizes, strict=True)))
        self.fingerprint = hashlib.sha256(listing.encode("utf-8", "backslashreplace")).hexdigest()

    def read(self, index: int) -> tuple[str, bytes]:
        """Return (key, encoded image) of a sample; raises `BadData` if it has changed or cannot be read."""
        try:
            data = self._paths[index].read_bytes()
        except OSError as error:
            raise BadData(f"cannot be read: {error.strerror}") from error
        if len(data) != self._sizes[index]:
            raise BadData(f"has {len(data)} bytes, but {self._sizes[index]} when training began")
        return self.keys[index], data


def image_paths(folder: Path) -> list[Path]:
    """List the images below a folder, sorted by path; hidden files and folders are left out, links are followed."""
    found: list[Path] = []
    visited: set[str] = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(directory))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(directory, name)) not in visited
        ]
        found += [
            Path(directory, name)
            for name in files
            if not name.startswith(".") and name.lower().rpartition(".")[2] in IMAGE_SUFFIXES
        ]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).parts)


def open_source(root: Path, name: str) -> Source:
    """Open the domain `root/name`.

    Args:
        root: Folder of the data set.
        name: Folder of the domain, such as "trainA". Where it holds `*.tar` files, these are its shards; else it holds
            images at any depth.

    Raises:
        ValueError: The folder is missing or holds no sample; the message shows what was expected and what is there.
    """
    folder = root / name
    source: Source
    if any(folder.glob("*.tar")):
        source = open_shards(folder, name)
    else:
        paths = image_paths(folder)
        source = FolderSource(folder, name, paths)
    if sum(source.counts) == 0:
        raise ValueError(_nothing_there(root, folder))
    return source


def _nothing_there(root: Path, folder: Path) -> str:
    problem = "holds no images" if folder.is_dir() else "is not there"
    expected = [
        "  trainA/  images of domain A to train with",
        "  trainB/  images of domain B to train with",
        "  testA/   images of domain A to test with",
        "  testB/   images of domain B to test with",
    ]
    hint = ""
    if any((root / part).is_dir() for part in ("train", "test", "val")):
        hint = "\nPictures that hold a pair side by side are cut by `python launchers/pack.py --side-by-side`."
    return (
        f"The folder {folder} {problem}.\nExpected in {root}:\n" + "\n".join(expected) + "\n"
        f"each with images ({', '.join(IMAGE_SUFFIXES)}; in folders of any depth) or with *.tar shards.\n"
        f"Found:\n{describe_tree(root)}{hint}\nMove or link the folders, or set the data set's path to where they are."
    )


def describe_tree(root: Path) -> str:
    """Describe a folder and the two levels below it, with the number of images and shards in each."""
    if not root.is_dir():
        return f"  nothing: {root} is not a folder"
    folders = sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir())
    lines = [f"  {path.relative_to(root).as_posix()}/  {_contents(path)}" for path in folders[:_SHOWN_FOLDERS]]
    if len(folders) > _SHOWN_FOLDERS:
        lines.append(f"  and {len(folders) - _SHOWN_FOLDERS} more folders")
    return "\n".join([f"  ./  {_contents(root, deep=False)}", *lines])


def _contents(folder: Path, *, deep: bool = True) -> str:
    names = [path.name.lower() for path in folder.iterdir() if path.is_file()]
    images = len(image_paths(folder)) if deep else sum(name.rpartition(".")[2] in IMAGE_SUFFIXES for name in names)
    shards = sum(name.endswith(".tar") for name in names)
    compressed = sum(name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")) for name in names)
    parts = [f"{images} images"]
    if shards:
        parts.append(f"{shards} shards")
    if compressed:
        parts.append(f"{compressed} compressed tar files (decompress them: samples are read one by one)")
    return ", ".join(parts)
