"""What translating makes of a picture: its translation, a heat map beside it, or those with many codes or labels."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from i2i_dist import styles
from i2i_dist.config import ConfigError
from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import image_paths
from i2i_dist.data.labels import LabelSpace
from i2i_dist.method import Attentive, Direction, Labelled, Method, Styled
from i2i_dist.telemetry.heat_maps import heat_map_pictures
from i2i_dist.telemetry.samples import to_uint8

_MOST_TARGETS = 32  # what stands above more columns of a sheet cannot be read


class Options(NamedTuple):
    """What is wanted other than the plain translation; the names and numbers are those of the command line.

    Attributes:
        attention: The heat map too.
        samples: Translations with so many drawn codes.
        seed: What they are drawn from; None for 0.
        styles: Pictures of the target domain, for a translation with the code of each.
        encoded: Folder of the pictures' partners, for the translation with the code of its own.
        interpolate: So many translations on the way between two codes.
        labels: Translations into each of these labels, "A=1,B=0"; or ("all",).
    """

    attention: bool = False
    samples: int | None = None
    seed: int | None = None
    styles: tuple[Path, ...] = ()
    encoded: Path | None = None
    interpolate: int | None = None
    labels: tuple[str, ...] = ()


class Padded(NamedTuple):
    """An image as networks take it.

    Attributes:
        image: float32 [1, 3, H, W] in [-1, 1]; H and W are multiples of what the method needs.
        height: Of the part of it, at the top left, that is the picture.
        width: Likewise.
    """

    image: Tensor
    height: int
    width: int

    def cropped(self, translated: Tensor) -> Tensor:
        """Return the part of a translation [1, 3, H, W] that belongs to the picture."""
        return translated[:, :, : self.height, : self.width]


class Result(NamedTuple):
    """A file to be: `values` is an image, floating [1, 3, H, W] in [-1, 1], or for a name in .npy an array [h, w]."""

    name: Path
    values: Tensor


def read_picture(path: Path) -> Tensor:
    """Return a picture as uint8 [H, W, 3]; raises BadData with what is wrong with it."""
    try:
        return torch.from_numpy(decode_image(path.read_bytes()))
    except OSError as error:
        raise BadData(f"cannot be read: {error.strerror}") from error


def padded(image: Tensor, multiple: int) -> Padded:
    """Pad a picture, uint8 [H, W, 3], by reflection, as often as it takes.

    Raises:
        ValueError: A side is shorter than 8 pixels.
    """
    height, width, _ = image.shape
    if min(height, width) < 8:
        raise ValueError(f"{width}x{height} pixels; both sides must have at least 8")
    normalised = image.permute(2, 0, 1)[None].float() / 127.5 - 1.0
    rows, columns = (_reflected(side, multiple).to(image.device) for side in (height, width))
    return Padded(normalised[:, :, rows][:, :, :, columns], height, width)


def _reflected(side: int, multiple: int) -> Tensor:
    """Return the rows of an image of `side` rows that make it a multiple: 0 1 2 3, then 2 1 0 1 2 3 2 ..."""
    rows = torch.arange(-(-side // multiple) * multiple) % (2 * side - 2)
    return torch.minimum(rows, 2 * side - 2 - rows)


class Renderer:
    """Makes the same results of every picture."""

    def __init__(self, method: Method, direction: Direction, options: Options, device: torch.device) -> None:
        """Prepare what all pictures share.

        Args:
            method: With its generator's side on `device`.
            direction: One that it has.
            options: What is wanted.
            device: Where it runs.

        Raises:
            ConfigError: The method cannot do it, the options do not go together, or a style cannot be used.
        """
        _check(method, options)
        self._method, self._direction, self._options = method, direction, options
        self._codes: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}
        self._drawn: list[str] = []
        self._partners: dict[Path, list[Path]] = {}
        self.diversities: list[float] = []  # of each picture's samples, where there are several
        if isinstance(method, Styled):
            self._codes = {tag: code[None].to(device) for tag, code in self._shared_codes(method, device).items()}
        if isinstance(method, Labelled):
            targets = _targets(method.label_space, options.labels)
            self._targets = {tag: torch.from_numpy(label)[None].float().to(device) for tag, label in targets.items()}
        if options.encoded is not None:
            for path in image_paths(options.encoded):
                self._partners.setdefault(path.relative_to(options.encoded).with_suffix(""), []).append(path)
            if not self._partners:
                raise ConfigError(f"--encoded {options.encoded}: no picture there; give the folder of the partners")

    def _shared_codes(self, method: Styled, device: torch.device) -> dict[str, Tensor]:
        """Return the codes that every picture is translated with, [style_dim] on the CPU, by what tells names apart."""
        options = self._options
        drawn = list(styles.drawn(options.seed or 0, options.samples, method.style_dim)) if options.samples else []
        taken = []
        for path in options.styles:
            try:
                taken.append(self._encode(method, path, device)[0].cpu())
            except BadData as error:
                raise ConfigError(f"--style {path}: {error}; give another picture") from error
        if options.interpolate is not None:
            first, last = drawn or taken
            return _by_number(styles.between(first, last, options.interpolate))
        by_number = _by_number(drawn)
        self._drawn = list(by_number) if len(by_number) > 1 else []
        tags = [*by_number, *(["encoded"] if options.encoded else []), *(path.stem for path in options.styles)]
        for tag, count in Counter(tags).items():
            if count > 1:
                raise ConfigError(
                    f"--style: {count} results of each picture would be called NAME_{tag}; rename a style"
                )
        return by_number | {path.stem: code for path, code in zip(options.styles, taken, strict=True)}

    @torch.no_grad()
    def _encode(self, method: Styled, path: Path, device: torch.device) -> Tensor:
        """Return the code [1, style_dim] of a picture; raises BadData with what is wrong with it."""
        try:
            return method.encode(padded(read_picture(path).to(device), self._method.multiple).image)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise BadData(str(error).strip().partition("\n")[0]) from error

    @property
    def heads(self) -> tuple[str, ...]:
        """What the results of a picture are called on a sheet that shows them all; empty where there is none."""
        return tuple(self._targets) if self._options.labels == ("all",) else ()

    def names(self, name: Path) -> list[Path]:
        """Name the files that come of the picture called `name`."""
        tags = [*self._codes, *self._targets, *(["encoded"] if self._options.encoded else [])]
        if tags:
            return [_tagged(name, tag) for tag in tags]
        return [name, *(_attention_names(name) if self._options.attention else ())]

    @torch.no_grad()
    def make(self, image: Tensor, name: Path) -> Iterator[Result]:
        """Yield the results of a picture one by one, in the order of `names`.

        Args:
            image: uint8 [H, W, 3], on the device of the method.
            name: What it is called.

        Raises:
            ValueError: A side is shorter than 8 pixels.
            BadData: Its partner cannot be used.
        """
        picture = padded(image, self._method.multiple)
        if isinstance(self._method, Styled) and (self._codes or self._partners):
            yield from self._styled(self._method, picture, name)
        elif isinstance(self._method, Attentive) and self._options.attention:
            yield from self._attended(self._method, picture, name)
        elif isinstance(self._method, Labelled):
            for tag, labels in self._targets.items():
                translated = self._method.translate_labelled(picture.image, labels)
                yield Result(_tagged(name, tag), picture.cropped(translated))
        else:
            yield Result(name, picture.cropped(self._method.translate(picture.image, self._direction)))

    def _attended(self, method: Attentive, picture: Padded, name: Path) -> Iterator[Result]:
        translated, maps = method.attend(picture.image, self._direction)
        covered, shown = (picture.image.shape[-2], picture.image.shape[-1]), (picture.height, picture.width)
        # Of the array those places stay that lie over the picture, if only in part.
        rows, columns = (
            -(-part * places // whole) for part, places, whole in zip(shown, maps.shape[-2:], covered, strict=True)
        )
        picture_name, array_name = _attention_names(name)
        yield Result(name, picture.cropped(translated))
        yield Result(picture_name, heat_map_pictures(maps, covered, shown))
        yield Result(array_name, maps[0, 0, :rows, :columns].float())

    def _styled(self, method: Styled, picture: Padded, name: Path) -> Iterator[Result]:
        own = {"encoded": self._partner_code(method, name, picture.image.device)} if self._options.encoded else {}
        drawn = []
        for tag, code in (self._codes | own).items():
            translated = picture.cropped(method.translate_styled(picture.image, code))
            yield Result(_tagged(name, tag), translated)
            if tag in self._drawn:
                drawn.append(to_uint8(translated)[0])
        if drawn:
            self.diversities.append(styles.diversity(drawn))

    def _partner_code(self, method: Styled, name: Path, device: torch.device) -> Tensor:
        found = self._partners.get(name.with_suffix(""), [])
        if len(found) != 1:
            what = f"{len(found)} pictures" if found else "no picture"
            raise BadData(f"{self._options.encoded} holds {what} of its name, suffixes aside, and one is needed")
        try:
            return self._encode(method, found[0], device)
        except BadData as error:
            raise BadData(f"its partner {found[0]}: {error}") from error


def _by_number(codes: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{number:02d}": code for number, code in enumerate(codes, 1)}


def _targets(space: LabelSpace, given: Sequence[str]) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the labels, uint8 [L], that every picture is translated into, by what tells names apart."""
    if "all" not in given:
        labels = [_parsed(space, text) for text in given]
    elif len(given) > 1:
        raise ConfigError("--labels all: it stands for every valid label; leave out the others")
    elif len(space.classes) > _MOST_TARGETS:
        raise ConfigError(
            f"--labels all: there are {len(space.classes)} valid labels, allowed are at most {_MOST_TARGETS}; name "
            "those that you want, each by a --labels"
        )
    else:
        labels = list(space.classes)
    texts = [space.text(label.tolist()) for label in labels]
    for text, count in Counter(texts).items():
        if count > 1:
            raise ConfigError(f"--labels: {count} results of each picture would be called NAME_{text}; leave one")
    return dict(zip(texts, labels, strict=True))


def _parsed(space: LabelSpace, text: str) -> npt.NDArray[np.uint8]:
    try:
        return space.parse(text)
    except ValueError as error:
        raise ConfigError(f"--labels {text}: {error}") from error


def _tagged(name: Path, tag: str) -> Path:
    return name.with_name(f"{name.stem}_{tag}{name.suffix}")


def _attention_names(name: Path) -> tuple[Path, Path]:
    # The colours of JPEG would not be those of the map.
    return name.with_name(f"{name.stem}_attention.png"), name.with_name(f"{name.stem}_attention.npy")


def _check(method: Method, options: Options) -> None:
    """Refuse what the method cannot do."""
    name = type(method).__name__
    wanted = {
        "--samples": options.samples is not None,
        "--style": bool(options.styles),
        "--encoded": options.encoded is not None,
        "--interpolate": options.interpolate is not None,
    }
    given = [option for option, is_given in wanted.items() if is_given]
    _check_labels(method, options, given)
    if options.attention and not isinstance(method, Attentive):
        raise ConfigError(f"--attention: {name} has no heat maps; leave it out")
    if given and not isinstance(method, Styled):
        raise ConfigError(f"{given[0]}: {name} has one translation for a picture, and no codes; leave it out")
    if given and options.attention:
        raise ConfigError(f"--attention: it shows the map of the plain translation; leave out {' and '.join(given)}")
    from_pictures = [option for option in ("--style", "--encoded") if wanted[option]]
    if from_pictures and isinstance(method, Styled) and not method.encodes:
        raise ConfigError(
            f"{from_pictures[0]}: the model of this checkpoint has no encoder, so that no code can be taken from a "
            "picture; draw codes with --samples N"
        )
    _check_numbers(options)


def _check_labels(method: Method, options: Options, others: Sequence[str]) -> None:
    name = type(method).__name__
    if not isinstance(method, Labelled):
        if options.labels:
            raise ConfigError(f"--labels: {name} does not translate into labels; leave it out")
        return
    others = [*others, *(["--attention"] if options.attention else [])]
    if others:
        raise ConfigError(f"{others[0]}: {name} makes one translation for each of --labels; leave it out")
    if not options.labels:
        space = method.label_space
        example = ",".join(f"{one}=1" for one, holds in zip(space.attributes, space.classes[-1], strict=True) if holds)
        raise ConfigError(
            f"--labels is missing: {name} translates a picture into one that has given attributes, of "
            f"{space}; write for example --labels {shlex.quote(example)}, or --labels all"
        )


def _check_numbers(options: Options) -> None:
    for option, value, least in (
        ("--samples", options.samples, 1),
        ("--seed", options.seed, 0),
        ("--interpolate", options.interpolate, 2),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{option}: given {value}, allowed is {least} or more")
    if options.seed is not None and options.samples is None:
        raise ConfigError("--seed: it is what --samples draws its codes from; give --samples N too")
    ends = options.samples or 0, len(options.styles)
    if options.interpolate is not None and ends not in ((2, 0), (0, 2)):
        raise ConfigError(
            f"--interpolate: it goes from one code to another, and there are {ends[0]} of --samples and {ends[1]} of "
            "--style; give either --samples 2 or two --style files"
        )
