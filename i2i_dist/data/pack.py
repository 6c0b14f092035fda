"""Packs folders of images into WebDataset shards with an index, and cuts side-by-side pairs in two."""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import webdataset
from PIL import Image

from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import IMAGE_SUFFIXES, decode_image
from i2i_dist.data.folders import describe_tree, image_paths
from i2i_dist.data.index import INDEX_NAME, build_index, save_index
from i2i_dist.data.transforms import resize as resize_image

_SPLITS = ("train", "test", "val")
_SIZES_SHOWN = 3


class Packed(NamedTuple):
    """What became of one domain.

    Attributes:
        domain: The domain's folder.
        shards: Number of shards.
        bytes: Bytes of the images.
        sizes: Number of images for each (width, height).
        unreadable: Path and reason of each image that was left out.
    """

    domain: str
    shards: int
    bytes: int
    sizes: Counter[tuple[int, int]]
    unreadable: list[str]


class _Part(NamedTuple):
    """An image that goes into a shard."""

    suffix: str
    content: bytes
    size: tuple[int, int]  # width, height


def pack(
    source: Path,
    target: Path,
    *,
    side_by_side: bool = False,
    swap: bool = False,
    resize: int | None = None,
    shard_size_mb: int = 256,
    overwrite: bool = False,
) -> list[Packed]:
    """Write `target/<domain>/000000.tar ...` and `index.npz` for each domain of a data set.

    Args:
        source: Folder with `trainA trainB testA testB valA valB` (those that are there), with images at any depth; or,
            for `side_by_side`, with `train test val`, or with the images themselves, which then count as `train`.
        target: Folder that receives the shards.
        side_by_side: The left half of each image is A and the right half is B, under the same key; of an odd width the
            middle column is dropped. Halves are stored as PNG, without loss.
        swap: With `side_by_side`: the left half is B and the right half is A.
        resize: Reduce larger images so that their shorter side has this many pixels. What is reduced is stored as PNG,
            or as JPEG of quality 95 where it was JPEG. Without it the files go into the shards byte by byte.
        shard_size_mb: Megabytes (1e6 bytes) after which a shard is closed.
        overwrite: Replace domains that `target` holds already.

    Returns:
        What was packed, for each domain. Images that cannot be decoded are left out and listed.

    Raises:
        ValueError: There is nothing to pack, the target is in use, or an option is out of range.
    """
    if swap and not side_by_side:
        raise ValueError("--swap says which half of a picture is A, so it needs --side-by-side; give both or neither.")
    _check(source, target, resize, shard_size_mb, overwrite)
    folders = _domain_folders(source, side_by_side)
    results = []
    for domain, folder in folders.items():
        half = ("BA" if swap else "AB").index(domain[-1]) if side_by_side else None
        results.append(_pack_domain(domain, folder, target, half, resize, shard_size_mb))
    if not any(result.shards for result in results):
        reasons = "\n".join(f"  {line}" for result in results for line in result.unreadable[:5])
        raise ValueError(f"None of the images in {source} can be read, so nothing was packed. Some reasons:\n{reasons}")
    return results


def _check(source: Path, target: Path, resize: int | None, shard_size_mb: int, overwrite: bool) -> None:
    if not source.is_dir():
        raise ValueError(f"The source {source} is not a folder; give the folder that holds the data set.")
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise ValueError(f"The target {target} lies in the source {source}; give a folder outside of it.")
    if resize is not None and resize < 1:
        raise ValueError(f"The size to resize to is {resize}; it must be at least 1 pixel.")
    if shard_size_mb < 1:
        raise ValueError(f"The shard size is {shard_size_mb} MB; it must be at least 1.")
    if target.exists() and not target.is_dir():
        raise ValueError(f"The target {target} is a file; give a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"The target {target} is not empty; give another folder, or --overwrite to replace shards.")

    for split in _SPLITS:
        for path in target.glob(f"{split}[AB]/*"):
            if path.suffix != ".tar" and path.name != INDEX_NAME:
                raise ValueError(f"{path} is not part of a packed data set and would be lost; move it away.")


def _domain_folders(source: Path, side_by_side: bool) -> dict[str, Path]:
    names = {f"{split}{side}": split if side_by_side else f"{split}{side}" for split in _SPLITS for side in "AB"}
    folders = {domain: source / name for domain, name in names.items() if (source / name).is_dir()}
    if side_by_side and not folders:
        folders = {"trainA": source, "trainB": source}
    folders = {domain: folder for domain, folder in folders.items() if image_paths(folder)}
    if not folders:
        wanted = "train/ test/ val/ or images" if side_by_side else "trainA/ trainB/ testA/ testB/ with images"
        hint = "" if side_by_side else "\nFor images that hold a pair side by side there is --side-by-side."
        raise ValueError(
            f"{source} should hold {wanted} ({', '.join(IMAGE_SUFFIXES)}), but holds:\n{describe_tree(source)}{hint}"
        )
    return folders


def _pack_domain(
    domain: str, folder: Path, target: Path, half: int | None, resize: int | None, shard_size_mb: int
) -> Packed:
    final, partial = target / domain, target / f".{domain}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was ended; a half-packed domain must not look whole
    partial.mkdir(parents=True)
    paths = image_paths(folder)
    keys = _safe_keys([path.relative_to(folder) for path in paths])
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable, total = [], 0
    with _ShardFiles(partial, shard_size_mb) as writer:
        for path, key in zip(paths, keys, strict=True):
            try:
                part = _prepare(path, half, resize)
            except BadData as error:
                unreadable.append(f"{path}: {error}")
                continue
            writer.write(key, part)
            sizes[part.size] += 1
            total += len(part.content)
    shards = sorted(partial.glob("*.tar"))
    if not sizes:
        shutil.rmtree(partial)
        return Packed(domain, 0, 0, sizes, unreadable)
    save_index(build_index(shards), partial / INDEX_NAME)  # reads back what was written
    shutil.rmtree(final, ignore_errors=True)  # there only where `overwrite` allows it
    partial.replace(final)
    return Packed(domain, len(shards), total, sizes, unreadable)


def _safe_keys(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a key for each path: without extension or dots, at which WebDataset would cut it, and unique."""
    taken: set[str] = set()
    for path in paths:
        plain = path.with_suffix("").as_posix().replace(".", "_").encode("utf-8", "backslashreplace").decode()
        key, number = plain, 2
        while key in taken:
            key, number = f"{plain}-{number}", number + 1
        taken.add(key)
        yield key


def _prepare(path: Path, half: int | None, resize: int | None) -> _Part:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadData(f"cannot be read: {error.strerror}") from error
    suffix = path.suffix[1:].lower()
    pixels = decode_image(content)  # [H, W, 3]
    changed = half is not None
    if half is not None:
        width = pixels.shape[1] // 2
        if width == 0:
            raise BadData("is too narrow for two halves")
        pixels = pixels[:, -width:] if half else pixels[:, :width]
        suffix = "png"
    shorter = min(pixels.shape[:2])
    if resize is not None and shorter > resize:
        height, width = (max(1, round(side * resize / shorter)) for side in pixels.shape[:2])
        pixels = resize_image(pixels, width, height)
        suffix = "jpg" if suffix in ("jpg", "jpeg") else "png"
        changed = True
    if changed:
        stream = io.BytesIO()
        if suffix == "jpg":
            Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling=0)
        else:
            Image.fromarray(pixels).save(stream, "PNG")
        content = stream.getvalue()
    return _Part(suffix, content, (pixels.shape[1], pixels.shape[0]))


class _ShardFiles:
    """Writes samples into numbered shards of a folder."""

    def __init__(self, folder: Path, shard_size_mb: int) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._writer = webdataset.ShardWriter(  # type: ignore[no-untyped-call, unused-ignore]
            "%06d.tar",
            maxsize=shard_size_mb * 1e6,
            post=self._closed,
            opener=self._opened,  # the folder's name must not pass through the pattern or through URL schemes
            verbose=0,
            mtime=0.0,  # the same images give the same shards
        )

    def __enter__(self) -> _ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, key: str, part: _Part) -> None:
        self._writer.write({"__key__": key, part.suffix: part.content})

    def _opened(self, name: str) -> BinaryIO:
        self._file = (self._folder / name).open("wb")
        return self._file

    def _closed(self, _name: str) -> None:
        if self._file is not None:
            self._file.close()


def summary(results: Sequence[Packed]) -> str:
    """Return a table: domain, images, shards, bytes, left out, and the most frequent sizes."""
    rows: list[tuple[str, ...]] = [("domain", "images", "shards", "bytes", "left out", "sizes (width x height)")]
    for r in results:
        common = r.sizes.most_common(_SIZES_SHOWN)
        sizes = [f"{width}x{height}: {count}" for (width, height), count in common]
        if len(r.sizes) > len(common):
            sizes.append(f"{len(r.sizes) - len(common)} other sizes: {r.sizes.total() - sum(n for _, n in common)}")
        counts = (r.sizes.total(), r.shards, r.bytes, len(r.unreadable))
        rows.append((r.domain, *(f"{count:,}" for count in counts), ", ".join(sizes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 with a sentence on stderr for input that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="pack.py", description="Pack trainA/ trainB/ testA/ testB/ into WebDataset shards with an index."
    )
    parser.add_argument("source", type=Path, help="folder with trainA/ trainB/ testA/ testB/, images at any depth")
    parser.add_argument("target", type=Path, help="folder that receives the shards")
    parser.add_argument("--side-by-side", action="store_true", help="images of train/ test/ val/ hold A left, B right")
    parser.add_argument("--swap", action="store_true", help="with --side-by-side: B left, A right")
    parser.add_argument("--resize", type=int, metavar="N", help="reduce larger images to N pixels on the shorter side")
    parser.add_argument("--shard-size-mb", type=int, default=256, metavar="MB", help="size of a shard (default 256)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that the target holds")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        results = pack(**vars(options))
    except (ValueError, OSError) as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 2
    for result in results:
        for line in result.unreadable:
            print(f"left out: {line}")
    print(summary(results))
    return 0
