"""From a checkpoint and pictures to translated pictures of the same names."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from i2i_dist import checkpoint
from i2i_dist.checkpoint import CheckpointError
from i2i_dist.config import ConfigError
from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import FORMATS, decode_image
from i2i_dist.data.folders import image_paths
from i2i_dist.method import Direction, Method
from i2i_dist.methods import resolve
from i2i_dist.telemetry.samples import to_uint8

Weights = Literal["ema", "last"]


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


def _reflected(side: int, multiple: int) -> Tensor:
    """Return the rows of an image of `side` rows that make it a multiple: 0 1 2 3, then 2 1 0 1 2 3 2 ..."""
    rows = torch.arange(-(-side // multiple) * multiple) % (2 * side - 2)
    return torch.minimum(rows, 2 * side - 2 - rows)


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
    height, width, _ = image.shape
    if min(height, width) < 8:
        raise ValueError(f"{width}x{height} pixels; both sides must have at least 8")
    normalised = image.permute(2, 0, 1)[None].float() / 127.5 - 1.0
    rows, columns = (_reflected(side, method.multiple).to(image.device) for side in (height, width))
    padded = normalised[:, :, rows][:, :, :, columns]
    return method.translate(padded, direction)[:, :, :height, :width]


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


def _save(pixels: Tensor, target: Path, file_format: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    options = {"quality": 95} if file_format in ("JPEG", "WEBP") else {}
    Image.fromarray(to_uint8(pixels)[0]).save(temporary, format=file_format, **options)
    os.replace(temporary, target)


def _translate_file(method: Method, path: Path, target: Path, direction: Direction, device: torch.device) -> bool:
    """Translate one file into another; return whether it was padded. Raises BadData with what is wrong with it."""
    writable = _writable_formats()
    file_format = writable.get(target.suffix.lower())
    if file_format is None:
        found = f"the suffix '{target.suffix}'" if target.suffix else "no suffix"
        raise BadData(
            f"the result keeps the name, which has {found}; pictures can be written as {', '.join(sorted(writable))}"
        )
    try:
        image = torch.from_numpy(decode_image(path.read_bytes()))
        height, width, _ = image.shape
    except OSError as error:
        raise BadData(f"cannot be read: {error.strerror}") from error
    try:
        translated = translate(method, image.to(device), direction)
    except ValueError as error:
        raise BadData(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        # What is known to end here is memory, for which a picture may be too large while the next one is not.
        first_line = str(error).strip().partition("\n")[0]
        raise BadData(f"its {width}x{height} pixels could not be translated: {first_line}") from error
    try:
        _save(translated, target, file_format)
    except (OSError, ValueError) as error:
        raise BadData(f"the result cannot be written: {error}") from error
    return bool(height % method.multiple or width % method.multiple)


def translate_all(method: Method, source: Path, target: Path, direction: Direction) -> int:
    """Translate a picture, or all pictures of a folder at any depth, into the folder `target`; return the exit code.

    Raises:
        ConfigError: The method does not translate that way, there is no picture, or the results would be among the
            pictures.
    """
    _check_direction(method, direction)
    pictures = _pictures(source)
    if not pictures:
        raise ConfigError(f"{source}: no picture there; expected an image file, or a folder with some at any depth")
    _check_target(source, target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.generator.to(device)
    failed, padded = 0, 0
    for path, name in pictures:
        try:
            padded += _translate_file(method, path, target / name, direction, device)
        except BadData as error:
            failed += 1
            print(f"{path}: left out: {error}", file=sys.stderr, flush=True)
    if padded:
        needed = method.multiple
        print(f"{padded} pictures had a side that is no multiple of {needed}: padded by reflection and cropped back")
    print(f"{len(pictures) - failed} pictures translated into {target}" + (f", {failed} left out" if failed else ""))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Translate; return the exit code: 0 done, 1 some pictures or the checkpoint are unusable, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="translate.py", description="Translate pictures with a trained generator.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for its newest one")
    parser.add_argument("source", type=Path, help="a picture, or a folder of pictures of any depth")
    parser.add_argument("target", type=Path, help="folder for the translated pictures, which keep their names")
    parser.add_argument("--direction", choices=["a_to_b", "b_to_a"], default="a_to_b")
    parser.add_argument("--weights", choices=["ema", "last"], default="ema", help="averaged (default) or last weights")
    options = parser.parse_args(arguments)
    try:
        method = load_method(options.checkpoint, options.weights, options.direction)
        return translate_all(method, options.source, options.target, options.direction)
    except (ConfigError, CheckpointError) as error:
        print(f"translate.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
