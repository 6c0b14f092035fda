"""From a checkpoint and pictures to translated pictures of the same names."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from i2i_dist import checkpoint
from i2i_dist.checkpoint import CheckpointError
from i2i_dist.config import ConfigError
from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import FORMATS
from i2i_dist.data.folders import image_paths
from i2i_dist.method import Direction, Method
from i2i_dist.methods import resolve
from i2i_dist.renderings import Options, Renderer, Result, padded, read_picture
from i2i_dist.sheets import Sheets, reduced
from i2i_dist.telemetry.samples import to_uint8

Weights = Literal["ema", "last"]
_PLAIN = Options()


def load_method(path: Path, weights: Weights = "ema", direction: Direction | None = None) -> Method:
    """Build the method that a checkpoint holds, with its generator's side filled in.

    Args:
        path: A checkpoint; or a run directory, or its folder of checkpoints, for the newest one that verifies.
        weights: "ema" for the averaged generators (the weights themselves where the run had no average), "last" for
            the weights as the last update left them.
        direction: The direction that it will be used for.

    Raises:
        CheckpointError: There is no checkpoint at `path`, or it does not verify.
        ConfigError: The checkpoint has no trained generator for `direction`.
    """
    path = checkpoint.find(path)
    sections = checkpoint.read_state(path).config
    method_class, config = resolve(sections["method"])
    # Of the official CycleGAN weights that are published, each file is one generator.
    directions = sections.get("converted", {}).get("directions", method_class.directions)
    if direction in method_class.directions and direction not in directions:
        raise ConfigError(f"direction: given '{direction}', but {path} holds a generator for {directions[0]} only")
    method = method_class(config, torch.Generator().manual_seed(0))
    checkpoint.fill(path, "generator", method.generator, averaged=weights == "ema")
    method.generator.eval()
    return method


@torch.no_grad()
def translate(method: Method, image: Tensor, direction: Direction) -> Tensor:
    """Translate one image of any size.

    Args:
        method: From `load_method`.
        image: uint8 [H, W, 3], on the device of the method.
        direction: Which way.

    Returns:
        float32 [1, 3, H, W] in [-1, 1]. A side that is not a multiple of what the method needs is padded by reflection,
        as often as it takes, and cropped back.

    Raises:
        ValueError: A direction that the method does not have, or a side shorter than 8 pixels.
    """
    _check_direction(method, direction)
    picture = padded(image, method.multiple)
    return picture.cropped(method.translate(picture.image, direction))


def _check_direction(method: Method, direction: Direction) -> None:
    if direction not in method.directions:
        allowed = " or ".join(method.directions)
        raise ConfigError(f"direction: given '{direction}', but this checkpoint's method translates {allowed} only")


def _pictures(source: Path) -> list[tuple[Path, Path]]:
    """Return each picture with its name below the target."""
    if source.is_dir():
        return [(path, path.relative_to(source)) for path in image_paths(source)]
    return [(source, Path(source.name))] if source.is_file() else []


def _check_target(source: Path, target: Path) -> None:
    folder = (source if source.is_dir() else source.parent).resolve()
    if target.resolve() == folder:
        raise ConfigError(f"{target} is where the pictures come from, and they would be replaced; name another folder")
    if source.is_dir() and folder in target.resolve().parents:
        raise ConfigError(
            f"{target} lies in {source}, and the next run would translate its pictures again; name a folder elsewhere"
        )


def _writable_formats() -> dict[str, str]:
    """Return, by the suffix, the formats that are read and that this Pillow can write."""
    extensions = Image.registered_extensions()
    return {suffix: name for suffix, name in extensions.items() if name in FORMATS and name in Image.SAVE}


def _save(result: Result, target: Path, file_format: str) -> None:
    """Write a result below the folder `target`, whole or not at all; raises BadData with the reason why it cannot."""
    path = target / result.name
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, result.values.cpu().numpy())
        else:
            options = {"quality": 95} if file_format in ("JPEG", "WEBP") else {}
            Image.fromarray(to_uint8(result.values)[0]).save(temporary, format=file_format, **options)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise BadData(f"the result cannot be written: {error}") from error


def _translate_file(
    renderer: Renderer, path: Path, name: Path, target: Path, device: torch.device
) -> list[npt.NDArray[np.uint8]]:
    """Write the results of one file; return the picture and, where a sheet will show them, its translations.

    Raises:
        BadData: With what is wrong with it.
    """
    writable = _writable_formats()
    if name.suffix.lower() not in writable:
        found = f"the suffix '{name.suffix}'" if name.suffix else "no suffix"
        raise BadData(
            f"the result keeps the name, which has {found}; pictures can be written as {', '.join(sorted(writable))}"
        )
    image = read_picture(path)
    height, width, _ = image.shape
    row = [image.numpy()]
    try:
        for result in renderer.make(image.to(device), name):
            _save(result, target, writable.get(result.name.suffix.lower(), ""))
            if renderer.heads:
                row.append(reduced(to_uint8(result.values)[0]))
    except ValueError as error:
        raise BadData(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        # What is known to end here is memory, for which a picture may be too large while the next one is not.
        first_line = str(error).strip().partition("\n")[0]
        raise BadData(f"its {width}x{height} pixels could not be translated: {first_line}") from error
    return row


def _check_names(pictures: Sequence[tuple[Path, Path]], renderer: Renderer) -> None:
    """Refuse pictures of which the result of one would replace that of another."""
    owners: dict[Path, Path] = {}
    for path, name in pictures:
        for result in renderer.names(name):
            other = owners.setdefault(result, path)
            if other != path:
                raise ConfigError(
                    f"both {other} and {path} would be translated into {result}; rename one of them, or translate them "
                    "into folders of their own"
                )


def translate_all(method: Method, source: Path, target: Path, direction: Direction, options: Options = _PLAIN) -> int:
    """Translate a picture, or all pictures of a folder at any depth, into the folder `target`; return the exit code.

    Raises:
        ConfigError: The method does not translate that way or cannot do what the options say, there is no picture, or
            the results would be among the pictures or replace one another.
    """
    _check_direction(method, direction)
    pictures = _pictures(source)
    if not pictures:
        raise ConfigError(f"{source}: no picture there; expected an image file, or a folder with some at any depth")
    _check_target(source, target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.generator.to(device)
    renderer = Renderer(method, direction, options, device)
    _check_names(pictures, renderer)
    failed, uneven, sheets = 0, 0, Sheets(target, renderer.heads)
    for path, name in pictures:
        try:
            image, *made = _translate_file(renderer, path, name, target, device)
            uneven += any(side % method.multiple for side in image.shape[:2])
            if made:
                sheets.add([reduced(image), *made])
        except BadData as error:
            failed += 1
            print(f"{path}: left out: {error}", file=sys.stderr, flush=True)
    sheets.finish()
    if sheets.problem:
        print(sheets.problem, file=sys.stderr)
    if uneven:
        needed = method.multiple
        print(f"{uneven} pictures had a side that is no multiple of {needed}: padded by reflection and cropped back")
    if renderer.diversities:
        mean = sum(renderer.diversities) / len(renderer.diversities)
        print(
            f"diversity {mean:.3f}: mean absolute difference of two samples of a picture, of values in [0, 255], over "
            f"all pairs of {options.samples} samples and {len(renderer.diversities)} pictures"
        )
    print(f"{len(pictures) - failed} pictures translated into {target}" + (f", {failed} left out" if failed else ""))
    return 1 if failed or sheets.problem else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="translate.py", description="Translate pictures with a trained generator.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for its newest one")
    parser.add_argument("source", type=Path, help="a picture, or a folder of pictures of any depth")
    parser.add_argument("target", type=Path, help="folder for the translated pictures, which keep their names")
    parser.add_argument("--direction", choices=["a_to_b", "b_to_a"], default="a_to_b")
    parser.add_argument("--weights", choices=["ema", "last"], default="ema", help="averaged (default) or last weights")
    attentive = parser.add_argument_group("methods that tell where they look (U-GAT-IT)")
    attentive.add_argument(
        "--attention",
        action="store_true",
        help="beside each translation its heat map: NAME_attention.png in colours, from the least to the greatest "
        "value of each map, and NAME_attention.npy, the values themselves (float32 [h, w], not one for each pixel)",
    )
    styled = parser.add_argument_group(
        "methods with many translations for a picture, one for each code (BicycleGAN)",
        "without any of these a picture is translated with the code 0, which is the most likely one",
    )
    styled.add_argument(
        "--samples", type=int, metavar="N",
        help="NAME_01 to NAME_N: translations with drawn codes, the same for every picture and whatever N is; from "
        "N = 2 on the mean difference between them is printed",
    )  # fmt: skip
    styled.add_argument("--seed", type=int, metavar="S", help="what --samples draws its codes from (default: 0)")
    styled.add_argument(
        "--style", type=Path, action="append", default=[], metavar="FILE",
        help="NAME_FILE: the translation with the code of this picture of the target domain; may be repeated",
    )  # fmt: skip
    styled.add_argument(
        "--encoded", type=Path, metavar="FOLDER",
        help="NAME_encoded: the translation with the code of the picture's partner, of the same name in FOLDER",
    )  # fmt: skip
    styled.add_argument(
        "--interpolate", type=int, metavar="N",
        help="NAME_01 to NAME_N: from one code to another in N steps, both included, in place of the translations with "
        "these two; they are those of --samples 2 or of two --style files",
    )  # fmt: skip
    labelled = parser.add_argument_group("methods that translate into labels (StarGAN, MatchGAN)")
    labelled.add_argument(
        "--labels", action="append", default=[], metavar="A=1,B=0",
        help="NAME_A: the translation into a picture that has attribute A and none that is not named; may be repeated. "
        "'all' for every label that is valid; labels-001.png and so on then show all pictures and translations",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Translate; return the exit code: 0 done, 1 some pictures or the checkpoint are unusable, 2 wrong arguments."""
    given = _parser().parse_args(arguments)
    options = Options(
        given.attention, given.samples, given.seed, tuple(given.style), given.encoded, given.interpolate,
        tuple(given.labels),
    )  # fmt: skip
    try:
        method = load_method(given.checkpoint, given.weights, given.direction)
        return translate_all(method, given.source, given.target, given.direction, options)
    except (ConfigError, CheckpointError) as error:
        print(f"translate.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
