"""Packs folders of images, and their labels, into WebDataset shards with an index, and cuts pairs in two."""

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
from i2i_dist.data.label_member import SUFFIX, encode_labels
from i2i_dist.data.labelled_domains import SPLITS, Domain, Labelling, labelled_domains
from i2i_dist.data.labels import SampleLabels
from i2i_dist.data.packed import Packed, label_summary, summary
from i2i_dist.data.transforms import resize as resize_image

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class _Part(NamedTuple):
    """An image that goes into a shard."""

    suffix: str
    content: bytes
    size: tuple[int, int]  # width, height


class _Change(NamedTuple):
    """What is done to pictures, in this order; a picture to which nothing is done goes into the shard as it is."""

    half: int | None
    crop: Box | None
    resize: int | None


def pack(
    source: Path,
    target: Path,
    *,
    side_by_side: bool = False,
    swap: bool = False,
    crop: Box | None = None,
    resize: int | None = None,
    shard_size_mb: int = 256,
    overwrite: bool = False,
    labelling: Labelling | None = None,
) -> list[Packed]:
    """Write `target/<domain>/000000.tar ...` and `index.npz` for each domain of a data set.

    Args:
        source: Folder with `trainA trainB testA testB valA valB` (those that are there), with images at any depth; or,
            for `side_by_side`, with `train test val`, or with the images themselves, which then count as `train`; or,
            for `labelling`, see `labelled_domains`.
        target: Folder that receives the shards.
        side_by_side: The left half of each image is A and the right half is B, under the same key; of an odd width the
            middle column is dropped. Halves are stored as PNG, without loss.
        swap: With `side_by_side`: the left half is B and the right half is A.
        crop: Keep this box of each picture. What is cut is stored as PNG, or as JPEG of quality 95 where it was JPEG.
        resize: Reduce larger images so that their shorter side has this many pixels. What is reduced is stored as PNG,
            or JPEG, too. Without these two the files go into the shards byte by byte.
        shard_size_mb: Megabytes (1e6 bytes) after which a shard is closed.
        overwrite: Replace domains that `target` holds already.
        labelling: Where the images' labels come from, which then go into the shards beside them.

    Returns:
        What was packed, for each domain. Images that cannot be decoded, or that the crop does not fit into, are left
        out and listed.

    Raises:
        ValueError: There is nothing to pack, the target is in use, or an option is out of range.
    """
    if swap and not side_by_side:
        raise ValueError("--swap says which half of a picture is A, so it needs --side-by-side; give both or neither.")
    if side_by_side and (crop or labelling):
        raise ValueError("--side-by-side is for pairs as they are; leave out --crop and labels, or --side-by-side.")
    _check(source, target, crop, resize, shard_size_mb)
    _check_target(target, overwrite)
    domains = labelled_domains(source, labelling) if labelling else _domains(source, side_by_side)
    results = []
    for name, domain in domains.items():
        half = ("BA" if swap else "AB").index(name[-1]) if side_by_side else None
        results.append(_pack_domain(name, domain, target, _Change(half, crop, resize), shard_size_mb))
    if not any(result.shards for result in results):
        reasons = "\n".join(f"  {line}" for result in results for line in result.unreadable[:5])
        raise ValueError(f"None of the images in {source} can be read, so nothing was packed. Some reasons:\n{reasons}")
    return results


def _check(source: Path, target: Path, crop: Box | None, resize: int | None, shard_size_mb: int) -> None:
    if not source.is_dir():
        raise ValueError(f"The source {source} is not a folder; give the folder that holds the data set.")
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise ValueError(f"The target {target} lies in the source {source}; give a folder outside of it.")
    if crop is not None and not (0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
        raise ValueError(
            f"The crop is {','.join(map(str, crop))}; it must be LEFT,TOP,RIGHT,BOTTOM from 0 on, with LEFT less than "
            "RIGHT and TOP less than BOTTOM."
        )
    if resize is not None and resize < 1:
        raise ValueError(f"The size to resize to is {resize}; it must be at least 1 pixel.")
    if shard_size_mb < 1:
        raise ValueError(f"The shard size is {shard_size_mb} MB; it must be at least 1.")


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"The target {target} is a file; give a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"The target {target} is not empty; give another folder, or --overwrite to replace shards.")
    for split in SPLITS:
        for path in target.glob(f"{split}[AB]/*"):
            if path.suffix != ".tar" and path.name != INDEX_NAME:
                raise ValueError(f"{path} is not part of a packed data set and would be lost; move it away.")


def _domains(source: Path, side_by_side: bool) -> dict[str, Domain]:
    names = {f"{split}{side}": split if side_by_side else f"{split}{side}" for split in SPLITS for side in "AB"}
    folders = {domain: source / name for domain, name in names.items() if (source / name).is_dir()}
    if side_by_side and not folders:
        folders = {"trainA": source, "trainB": source}
    domains = {name: Domain(folder, image_paths(folder)) for name, folder in folders.items()}
    domains = {name: domain for name, domain in domains.items() if domain.paths}
    if not domains:
        wanted = "train/ test/ val/ or images" if side_by_side else "trainA/ trainB/ testA/ testB/ with images"
        hint = "" if side_by_side else "\nFor images that hold a pair side by side there is --side-by-side."
        raise ValueError(
            f"{source} should hold {wanted} ({', '.join(IMAGE_SUFFIXES)}), but holds:\n{describe_tree(source)}{hint}"
        )
    return domains


def _pack_domain(name: str, domain: Domain, target: Path, change: _Change, shard_size_mb: int) -> Packed:
    final, partial = target / name, target / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was ended; a half-packed domain must not look whole
    partial.mkdir(parents=True)
    keys = _safe_keys([path.relative_to(domain.folder) for path in domain.paths])
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable, used, total = [], [], 0
    with _ShardFiles(partial, shard_size_mb) as writer:
        for number, (path, key) in enumerate(zip(domain.paths, keys, strict=True)):
            try:
                part = _prepare(path, change)
            except BadData as error:
                unreadable.append(f"{path}: {error}")
                continue
            writer.write(key, part, _encoded_labels(domain.labels, number))
            used.append(number)
            sizes[part.size] += 1
            total += len(part.content)
    shards = sorted(partial.glob("*.tar"))
    if not sizes:
        shutil.rmtree(partial)
        return Packed(name, 0, 0, sizes, unreadable)
    save_index(build_index(shards), partial / INDEX_NAME)  # reads back what was written
    shutil.rmtree(final, ignore_errors=True)  # there only where `overwrite` allows it
    partial.replace(final)
    labels = domain.labels and SampleLabels(domain.labels.attributes, domain.labels.values[used])
    return Packed(name, len(shards), total, sizes, unreadable, labels)


def _encoded_labels(labels: SampleLabels | None, number: int) -> bytes | None:
    """Return the labels of a picture as they are stored; None where nothing is known of it."""
    if labels is None or (labels.values[number] < 0).all():
        return None
    return encode_labels(labels.attributes, labels.values[number])


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


def _prepare(path: Path, change: _Change) -> _Part:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadData(f"cannot be read: {error.strerror}") from error
    suffix = path.suffix[1:].lower()
    pixels = decode_image(content)  # [H, W, 3]
    found = pixels
    lossless = suffix not in ("jpg", "jpeg")
    if change.half is not None:
        width = pixels.shape[1] // 2
        if width == 0:
            raise BadData("is too narrow for two halves")
        pixels, lossless = pixels[:, -width:] if change.half else pixels[:, :width], True
    if change.crop is not None:
        left, top, right, bottom = change.crop
        if right > pixels.shape[1] or bottom > pixels.shape[0]:
            raise BadData(f"has {pixels.shape[1]}x{pixels.shape[0]} pixels, into which the crop does not fit")
        pixels = pixels[top:bottom, left:right]
    shorter = min(pixels.shape[:2])
    if change.resize is not None and shorter > change.resize:
        height, width = (max(1, round(side * change.resize / shorter)) for side in pixels.shape[:2])
        pixels = resize_image(pixels, width, height)
    if pixels is not found:
        stream = io.BytesIO()
        if lossless:
            Image.fromarray(pixels).save(stream, "PNG")
        else:
            Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling=0)
        suffix, content = "png" if lossless else "jpg", stream.getvalue()
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

    def write(self, key: str, part: _Part, labels: bytes | None) -> None:
        members = {} if labels is None else {SUFFIX: labels}
        self._writer.write({"__key__": key, part.suffix: part.content, **members})

    def _opened(self, name: str) -> BinaryIO:
        self._file = (self._folder / name).open("wb")
        return self._file

    def _closed(self, _name: str) -> None:
        if self._file is not None:
            self._file.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pack.py", description="Pack trainA/ trainB/ testA/ testB/ into WebDataset shards with an index."
    )
    parser.add_argument("source", type=Path, help="folder with trainA/ trainB/ testA/ testB/, images at any depth")
    parser.add_argument("target", type=Path, help="folder that receives the shards")
    parser.add_argument("--side-by-side", action="store_true", help="images of train/ test/ val/ hold A left, B right")
    parser.add_argument("--swap", action="store_true", help="with --side-by-side: B left, A right")
    parser.add_argument(
        "--crop", type=_box, metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="keep this box of each picture, in pixels: 0,20,178,198 is CelebA's centre, 40,170,640,770 RaFD's",
    )  # fmt: skip
    parser.add_argument(
        "--resize", type=int, metavar="N", help="reduce larger images, once cropped, to N pixels on the shorter side"
    )
    parser.add_argument("--shard-size-mb", type=int, default=256, metavar="MB", help="size of a shard (default 256)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that the target holds")
    labels = parser.add_argument_group(
        "pictures with labels, for StarGAN and MatchGAN",
        "they have one domain, A; SOURCE holds trainA/ testA/ valA/, or pictures, which then count as trainA",
    )
    origin = labels.add_mutually_exclusive_group()
    origin.add_argument("--labels-celeba", type=Path, metavar="FILE", help="CelebA's list_attr_celeba.txt")
    origin.add_argument(
        "--labels-csv", type=Path, metavar="FILE",
        help="a table with headings: the picture's path below SOURCE or its last part, then for each attribute 1, 0 or "
        "-1, or nothing where it is not known",
    )  # fmt: skip
    origin.add_argument(
        "--labels-rafd", action="store_true",
        help="RaFD's file names; a tenth of the people becomes testA where SOURCE has no trainA/ testA/",
    )  # fmt: skip
    labels.add_argument("--attributes", type=_names, metavar="A,B,C", help="attributes to keep (default all)")
    labels.add_argument(
        "--partition", type=Path, metavar="FILE", help="CelebA's list_eval_partition.txt: 0 trainA, 1 valA, 2 testA"
    )
    return parser


def _box(text: str) -> Box:
    try:
        left, top, right, bottom = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected are four numbers of pixels") from None
    return left, top, right, bottom


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _labelling(options: argparse.Namespace) -> Labelling | None:
    """Return where labels come from; raises ValueError for options that need them, without them."""
    labelling = Labelling(
        options.labels_celeba, options.labels_csv, options.labels_rafd, options.attributes, options.partition
    )
    if any(labelling[:3]):
        return labelling
    if any(labelling):
        raise ValueError(
            "--attributes and --partition are for pictures with labels; say where these are with --labels-celeba, "
            "--labels-csv or --labels-rafd."
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 with a sentence on stderr for input that the user can mend."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        results = pack(
            options.source,
            options.target,
            side_by_side=options.side_by_side,
            swap=options.swap,
            crop=options.crop,
            resize=options.resize,
            shard_size_mb=options.shard_size_mb,
            overwrite=options.overwrite,
            labelling=_labelling(options),
        )
    except (ValueError, OSError) as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 2
    for result in results:
        for line in result.unreadable:
            print(f"left out: {line}")
    print(summary(results))
    for result in results:
        if result.labels is not None:
            print(f"\n{label_summary(result.domain, result.labels)}")
    return 0
