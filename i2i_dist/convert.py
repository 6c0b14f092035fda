"""Checkpoints of the authors' PyTorch code in and out: their networks become a checkpoint of ours, and the reverse."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from i2i_dist import checkpoint, engine_state, saver
from i2i_dist.checkpoint import CheckpointError, State
from i2i_dist.config import ConfigError
from i2i_dist.method import SIDES, Labelled, Method
from i2i_dist.methods import resolve
from i2i_dist.official import files
from i2i_dist.official.files import listed
from i2i_dist.official.matchgan import label_keys
from i2i_dist.official.names import Idle, Names, Network, TensorsByName, names
from i2i_dist.official.networks import FORMS, MULTIPLES, NETWORKS
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep

_COUNT = torch.empty((), dtype=torch.int64, device="meta")  # a batch norm's count of batches


class Attributes(NamedTuple):
    """What the attributes of labels are called, of which official files only tell how many there are.

    Attributes:
        names: In their order there.
        exactly_one: Whether exactly one of them holds.
    """

    names: Sequence[str]
    exactly_one: bool


class Converted(NamedTuple):
    """What was converted, for people.

    Attributes:
        networks: The official networks that were read or written.
        absent: Those that there was no file of.
        notes: Sentences on what was decided.
    """

    networks: tuple[str, ...]
    absent: tuple[str, ...]
    notes: tuple[str, ...]


class _Match(NamedTuple):
    """What a file held: tensors by our names, counts of batches by the official ones, and names that nothing reads."""

    tensors: dict[str, Tensor]
    counts: dict[str, int]
    unread: list[str]


# ---------------------------------------------------------------------------------------------------- from the official


def from_official(
    name: str, source: Path, target: Path, epoch: str | None = None, attributes: Attributes | None = None
) -> Converted:
    """Write official networks as a run directory with one checkpoint of 0 images seen.

    The sizes of the networks are read off the tensors. Networks that are not there are initialised afresh; a direction
    without a generator is one that `translate` refuses.

    Args:
        name: The method.
        source: Directory of the official files.
        target: The run directory, which must not be there.
        epoch: Which of several checkpoints, as its files' names say it; None for the latest, or the only one.
        attributes: Of methods with labels; None for those of the official code's data sets, by their number.

    Raises:
        ConfigError: `source` has no generator of this method and epoch, `target` is there, or the attributes do not fit
            or have to be told.
        CheckpointError: A file cannot be read, or does not hold what the network needs; the message says what.
    """
    networks, found = NETWORKS[name], files.read(name, source, epoch)
    given = {found.places[key]: (networks[key], tensors) for key, tensors in found.tensors.items()}
    method_class, config = _configuration(name, given, attributes)
    with torch.device("meta"):  # names and shapes are compared before anything is allocated
        template = method_class(config, torch.Generator())
    matches = {}
    for key, tensors in found.tensors.items():
        expected = _names(template, config, networks[key])
        matches[key] = _match(found.places[key], tensors, expected, _tensors(template, networks[key]))
    method = method_class(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for key, match in matches.items():
            ours = _tensors(method, networks[key])
            for tensor_name, tensor in match.tensors.items():
                ours[tensor_name].copy_(tensor.view_as(ours[tensor_name]))
    absent = tuple(key for key in networks if key not in matches)
    section = {
        "absent": absent,
        "directions": [networks[key].direction for key in matches if networks[key].direction],
        "counts": {key: match.counts for key, match in matches.items() if match.counts},
    }
    state = State(0, 0, 1, {"method": config.model_dump(mode="json"), "converted": section}, {}, {})
    captured = {str(side): engine_state.capture_module(getattr(method, side)) for side in SIDES}
    with _new_directory(target) as run:
        failure = saver.write(run / "checkpoints", state, captured, ImagePools((), 0, 0), Keep(1))
        if failure:
            raise CheckpointError(f"{target} cannot be written: {failure.reason}")
    notes = list(_notes(name, config, matches))
    if isinstance(method, Labelled):
        notes.append(f"the files do not name the attributes of labels; taken to be {method.label_space}")
    if found.unread:
        notes.append(f"not read, since {name} has no such network: {listed(found.unread)}")
    return Converted(tuple(matches), absent, tuple(notes))


def _notes(name: str, config: Any, matches: Mapping[str, _Match]) -> Iterator[str]:
    for key, match in matches.items():
        if match.unread:
            yield f"{key}: left out statistics of instance norms, which nothing reads: {listed(match.unread)}"
        if NETWORKS[name][key].taps:
            layers = ", ".join(config.nce_layers)
            yield f"{key}: the file does not say which layers of the generator it reads; taken to be {layers}"


def _configuration(
    name: str, given: Mapping[str, tuple[Network, TensorsByName]], attributes: Attributes | None
) -> tuple[type[Method], BaseModel]:
    """Return the method with the sizes that its networks have."""
    sizes: dict[str, Any] = {}
    found = None
    for network, tensors in given.values():
        sizes = network.sizes(tensors) | sizes  # where two differ, the shapes of one will be refused by name
        found = network.attributes(tensors) if network.attributes else found
    if found is not None:
        sizes |= label_keys(found, *(attributes or Attributes((), False)))
    elif attributes is not None:
        raise ConfigError(f"--attributes, --exactly-one: {name} has no labels; leave it out")
    try:
        return resolve({"name": name, **sizes})
    except ConfigError as error:
        raise CheckpointError(f"{', '.join(given)}: no {name} here has these sizes: {error}") from None


def _match(place: str, given: TensorsByName, expected: Names, template: TensorsByName) -> _Match:
    """Find our names for the tensors of one file, all of them there and nothing left over."""
    match = _Match({}, {}, [name for name in given if name in expected.unread])
    missing = [name for name, ours in expected.tensors.items() if name not in given and _is_needed(ours)]
    left_over = [name for name in given if name not in expected.tensors and name not in expected.unread]
    shapes, filters = [], []
    for name, ours in expected.tensors.items():
        if name not in given or isinstance(ours, Idle):
            continue
        wanted = _COUNT if ours is None else template[ours] if isinstance(ours, str) else ours
        if name in expected.columns:
            wanted = wanted[None, :, None, None]
        if given[name].shape != wanted.shape or given[name].dtype != wanted.dtype:
            shapes.append(f"{name} is {_shape(given[name])} and not {_shape(wanted)}")
        elif ours is None:
            match.counts[name] = int(given[name])
        elif isinstance(ours, str):
            match.tensors[ours] = given[name]
        elif not torch.equal(given[name], ours):
            filters.append(name)
    problems = {"missing": missing, "left over": left_over, "other shapes": shapes, "other fixed filters": filters}
    if any(problems.values()):
        told = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{place} is not this network; {told}{_hint(given, expected)}")
    return match


def _is_needed(ours: str | Tensor | Idle | None) -> bool:
    return ours is not None and not isinstance(ours, Idle)


def _hint(given: TensorsByName, expected: Names) -> str:
    has = any(name.endswith(".filt") for name in given)
    needs = any(name.endswith(".filt") for name in expected.tensors)
    if has == needs or not given.keys() & expected.tensors.keys():  # a network of another kind altogether
        return ""
    kind = "with fixed filters (anti-aliased)" if has else "with strided convolutions (--no_antialias)"
    return f"; it was trained {kind}, which this method here is not"


# ------------------------------------------------------------------------------------------------------ to the official


def to_official(name: str, source: Path, target: Path, epoch: str | None = None, averaged: bool = True) -> Converted:
    """Write one of our checkpoints as the official files.

    Networks that were initialised afresh when the checkpoint itself was converted are left out.

    Args:
        name: The method, which must be the checkpoint's.
        source: A checkpoint, or a run directory for its newest one that verifies.
        target: Directory for the files, which must not be there.
        epoch: What the files' names shall say of it; None for the latest.
        averaged: Whether to take the averaged generators, where there are some, in place of the last weights.

    Raises:
        ConfigError: The checkpoint is of another method, or `target` is there.
        CheckpointError: There is no checkpoint, or it does not verify.
    """
    path = checkpoint.find(source)
    sections = checkpoint.read_state(path).config
    given = sections["method"]["name"]
    if given != name:
        raise ConfigError(f"--to {name}: {path} is a checkpoint of {given}")
    method_class, config = resolve(sections["method"])
    for key, value in FORMS.get(name, {}).items():
        if (ours := getattr(config, key)) != value:
            raise ConfigError(f"{path} has {key}: {ours}, and the official code of {name} only knows {value}")
    for key, number in MULTIPLES.get(name, {}).items():
        if (ours := getattr(config, key)) % number:
            raise ConfigError(
                f"{path} has {key}: {ours}, and the official code of {name} only knows multiples of {number}"
            )
    method = method_class(config, torch.Generator().manual_seed(0))
    for side in SIDES:
        checkpoint.fill(path, side, getattr(method, side), averaged)
    converted = sections.get("converted", {"absent": (), "counts": {}})
    absent = tuple(converted["absent"])
    written = tuple(key for key in NETWORKS[name] if key not in absent)
    networks = {key: official_tensors(name, method, config, key, converted["counts"].get(key)) for key in written}
    with _new_directory(target) as directory:
        files.write(name, directory, target.name, epoch, networks)
    notes = [
        f"{key}: statistics of instance norms, which its code does not read, are written as mean 0 and variance 1"
        for key in written
        if any(isinstance(place, Idle) for place in _names(method, config, NETWORKS[name][key]).tensors.values())
    ]
    return Converted(written, absent, tuple(notes))


def official_tensors(
    name: str, method: Method, config: BaseModel, key: str, counts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of one network under their official names, in the official order.

    Args:
        name: The method's name.
        method: What holds the network.
        config: The method's hyperparameters.
        key: Which of its networks, as the official code calls it.
        counts: What batch norms have counted, by official name; 0 where it is not said.
    """
    network = NETWORKS[name][key]
    expected, ours = _names(method, config, network), _tensors(method, network)
    tensors: dict[str, Tensor] = {}
    for official, place in expected.tensors.items():
        if place is None:
            tensors[official] = torch.tensor((counts or {}).get(official, 0))
        elif isinstance(place, Idle):
            tensors[official] = place.value
        else:
            tensor = ours[place] if isinstance(place, str) else place
            tensors[official] = (tensor[None, :, None, None] if official in expected.columns else tensor).contiguous()
    return tensors


# ---------------------------------------------------------------------------------------------------------- either way


def _tensors(method: Method, network: Network) -> TensorsByName:
    """Return the parameters and buffers that a network is here, by name."""
    side, _, inner = network.place.partition(".")
    tensors: TensorsByName = getattr(method, side).get_submodule(inner).state_dict()
    return tensors


def _names(method: Method, config: BaseModel, network: Network) -> Names:
    return names(network.tree(config), _tensors(method, network))


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Give a directory to fill, which becomes `target` in one step, or is removed if anything goes wrong."""
    if os.path.lexists(target):
        raise ConfigError(f"{target} is there already; name a directory that is not")
    filling = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        filling.mkdir(parents=True)
        yield filling
        os.rename(filling, target)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when the disk is full
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(f"{target} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; return the exit code: 0 done, 1 a file or checkpoint is unusable, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description="Convert checkpoints of the methods' official PyTorch code, there and back."
    )
    way = parser.add_mutually_exclusive_group(required=True)
    known = sorted(NETWORKS)
    way.add_argument("--from", dest="origin", choices=known, help="source is a directory of official files")
    way.add_argument("--to", choices=known, help="source is a checkpoint, or a run directory for its newest one")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a directory that is not there yet")
    parser.add_argument(
        "--epoch",
        help="which official checkpoint, as its files' names say it (default: the latest; with --to stargan or "
        "matchgan 200000, which their code reads)",
    )
    parser.add_argument("--weights", choices=["ema", "last"], default="ema", help="with --to: averaged or last weights")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--attributes", metavar="A,B,...",
        help="with --from stargan or matchgan: its attributes in their order (default: those of CelebA or of RaFD)",
    )  # fmt: skip
    labels.add_argument("--exactly-one", metavar="A,B,...", help="likewise, if each picture has exactly one of them")
    options = parser.parse_args(arguments)
    exactly_one = options.exactly_one is not None
    named = options.exactly_one if exactly_one else options.attributes
    attributes = None if named is None else Attributes([word.strip() for word in named.split(",")], exactly_one)
    try:
        if options.origin:
            converted = from_official(options.origin, options.source, options.target, options.epoch, attributes)
        elif attributes:
            raise ConfigError("--attributes, --exactly-one: with --to the checkpoint has the names; leave it out")
        else:
            averaged = options.weights == "ema"
            converted = to_official(options.to, options.source, options.target, options.epoch, averaged)
    except (ConfigError, CheckpointError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"converted into {options.target}: {', '.join(converted.networks)}")
    if converted.absent:
        fate = "initialised afresh" if options.origin else "left out"
        print(f"not there, and so {fate}: {', '.join(converted.absent)}")
    for note in converted.notes:
        print(note)
    return 0
