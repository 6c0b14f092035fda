"""Finds out which pictures of a data set with labels are for training and which for test, and what they show."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i2i_dist.data.decode import IMAGE_SUFFIXES
from i2i_dist.data.folders import describe_tree, image_paths
from i2i_dist.data.label_files import RAFD_EMOTIONS, Rows, read_celeba, read_csv, read_partition, read_rafd
from i2i_dist.data.labels import SampleLabels, check_names
from i2i_dist.draws import generator

SPLITS = ("train", "test", "val")
_log = logging.getLogger("i2i_dist.data")


class Labelling(NamedTuple):
    """Where labels come from; one of the first three is given.

    Attributes:
        celeba: CelebA's list of attributes.
        csv: A table of comma-separated values.
        rafd: Whether the names of the files say it, as those of RaFD do.
        attributes: The attributes to keep; None for all.
        partition: CelebA's list of which picture is for training, validation or test.
    """

    celeba: Path | None = None
    csv: Path | None = None
    rafd: bool = False
    attributes: tuple[str, ...] | None = None
    partition: Path | None = None


class Domain(NamedTuple):
    """The pictures of one domain.

    Attributes:
        folder: What their keys are relative to.
        paths: The files, in order.
        labels: What is known of them; None in a data set without labels.
    """

    folder: Path
    paths: list[Path]
    labels: SampleLabels | None = None


def labelled_domains(source: Path, labelling: Labelling) -> dict[str, Domain]:
    """Divide the pictures of a folder into the domains trainA, testA and valA, with their labels.

    Args:
        source: Folder with `trainA testA valA`; or with pictures at any depth, which are divided by the partition, or,
            those of RaFD, by identity (a tenth of the people is for test), or else are all for training.
        labelling: Where labels come from. A row of a file names a picture by its path below `source` or by the last
            part of it. Of pictures that no row names nothing is known.

    Raises:
        ValueError: There are no such pictures, a file is not valid or does not fit them, or an attribute is not there.
    """
    domains = _folders(source)
    divided = bool(domains)
    if not divided:
        domains = {"trainA": Domain(source, image_paths(source))}
    paths = [path for domain in domains.values() for path in domain.paths]
    if not paths:
        raise ValueError(
            f"{source} should hold trainA/ testA/ with images, or images ({', '.join(IMAGE_SUFFIXES)}), but holds:\n"
            f"{describe_tree(source)}"
        )
    labels = _kept(_labels(source, paths, labelling), labelling.attributes)
    if divided and labelling.partition is None:
        parts = [name[:-1] for name, domain in domains.items() for _ in domain.paths]
    elif divided:
        raise ValueError(
            f"{source} holds {', '.join(f'{name}/' for name in domains)}, and --partition divides a folder without "
            "such folders; leave out one of both."
        )
    else:
        parts = _parts(source, paths, labelling)
    found: dict[str, Domain] = {}
    for split in SPLITS:
        own = [number for number, part in enumerate(parts) if part == split]
        if own:
            folder = domains[f"{split}A"].folder if divided else source
            chosen = SampleLabels(labels.attributes, labels.values[own])
            found[f"{split}A"] = Domain(folder, [paths[number] for number in own], chosen)
    return found


def _folders(source: Path) -> dict[str, Domain]:
    """Return the folders of `source` that are domains and hold pictures."""
    folders = {f"{split}{side}": source / f"{split}{side}" for split in SPLITS for side in "AB"}
    domains = {name: Domain(folder, image_paths(folder)) for name, folder in folders.items() if folder.is_dir()}
    domains = {name: domain for name, domain in domains.items() if domain.paths}
    of_b = [f"{name}/" for name in domains if name.endswith("B")]
    if of_b:
        raise ValueError(
            f"{source} holds {', '.join(of_b)}, but a data set with labels has one domain, A: what would be B is other "
            "labels. Move its pictures to trainA/ testA/, or pack without labels."
        )
    return domains


def _labels(source: Path, paths: Sequence[Path], labelling: Labelling) -> SampleLabels:
    """Return what is known of the pictures."""
    if labelling.rafd:
        emotions = [RAFD_EMOTIONS.index(read_rafd(path)[1]) for path in paths]
        return SampleLabels(RAFD_EMOTIONS, np.eye(len(RAFD_EMOTIONS), dtype=np.int8)[emotions])
    if labelling.celeba is not None:
        rows, table = read_celeba(labelling.celeba)
    else:
        assert labelling.csv is not None
        rows, table = read_csv(labelling.csv)
    places = _rows_of(rows, source, paths)
    unused = len(rows.names) - int(np.count_nonzero(places >= 0))
    if unused:
        _log.warning("%d of the %d pictures that %s names are not there.", unused, len(rows.names), rows.path)
    values = np.where(places[:, None] >= 0, table.values[places], np.int8(-1))
    return SampleLabels(table.attributes, values)


def _rows_of(rows: Rows, source: Path, paths: Sequence[Path]) -> npt.NDArray[np.int64]:
    """Return for each picture the row that names it, or -1.

    Raises:
        ValueError: A row names several pictures, several rows name one, or there is no picture that is named.
    """
    numbers = {name: number for number, name in enumerate(rows.names)}
    owners: dict[int, Path] = {}
    found = np.full(len(paths), -1, dtype=np.int64)
    for place, path in enumerate(paths):
        parts = path.relative_to(source).parts
        endings = ["/".join(parts[first:]) for first in range(len(parts))]
        naming = [numbers[ending] for ending in endings if ending in numbers]
        if len(naming) > 1:
            one, other = (f"line {rows.lines[number]} ({rows.names[number]})" for number in naming[:2])
            raise ValueError(f"{rows.path}: both {one} and {other} name {path}; leave one of them.")
        for number in naming:
            if number in owners:
                raise ValueError(
                    f"{rows.path}, line {rows.lines[number]}, names {rows.names[number]!r}, which {owners[number]} and "
                    f"{path} both are; write more of the path below {source}."
                )
            owners[number] = path
            found[place] = number
    if not owners:
        example = f", but for example {rows.names[0]!r} in line {rows.lines[0]}" if rows.names else ""
        raise ValueError(
            f"{rows.path} names none of the {len(paths)} pictures in {source}, such as "
            f"{paths[0].relative_to(source).as_posix()!r}{example}; check that the two belong together."
        )
    return found


def _kept(labels: SampleLabels, attributes: tuple[str, ...] | None) -> SampleLabels:
    attributes = labels.attributes if attributes is None else attributes
    missing = [name for name in attributes if name not in labels.attributes]
    if missing:
        raise ValueError(f"--attributes names {', '.join(missing)}; there are {', '.join(labels.attributes)}.")
    check_names(attributes)
    return SampleLabels(attributes, labels.values[:, [labels.attributes.index(name) for name in attributes]])


def _parts(source: Path, paths: Sequence[Path], labelling: Labelling) -> list[str]:
    """Return for each of the pictures of one folder whether it is for "train", "test" or "val"."""
    if labelling.partition is not None:
        return _parts_by_list(labelling.partition, source, paths)
    if labelling.rafd:
        return _parts_by_identity([read_rafd(path)[0] for path in paths])
    mistaken = sorted({path.relative_to(source).parts[0] for path in paths} & set(SPLITS))
    if mistaken:
        raise ValueError(
            f"{source} holds {', '.join(f'{name}/' for name in mistaken)}, whose pictures would all be for training; "
            f"name the folders trainA/ testA/ valA/, or divide the pictures with --partition."
        )
    return ["train"] * len(paths)


def _parts_by_list(partition: Path, source: Path, paths: Sequence[Path]) -> list[str]:
    rows, parts = read_partition(partition)
    places = _rows_of(rows, source, paths)
    missing = np.flatnonzero(places < 0)
    if len(missing):
        raise ValueError(
            f"{partition} does not name {paths[missing[0]]}"
            + (f" and {len(missing) - 1} more pictures" if len(missing) > 1 else "")
            + "; write them into it, or move them away."
        )
    return [parts[place] for place in places]


def _parts_by_identity(identities: Sequence[int]) -> list[str]:
    """Put a tenth of the people into the test, 7 of 67: who it is hardly depends on who else is there."""
    people = sorted(set(identities), key=lambda identity: generator(0, "test_identities", identity).random())
    tested = set(people[: max(1, round(len(people) / 10))] if len(people) > 1 else [])
    return ["test" if identity in tested else "train" for identity in identities]
