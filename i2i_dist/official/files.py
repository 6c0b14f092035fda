"""The files of official checkpoints.

They are `EPOCH_net_NAME.pth` or `ITERATION-NAME.ckpt` for each network, or `DATASET_params_EPOCH.pt` for all.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2i_dist.checkpoint import CheckpointError
from i2i_dist.config import ConfigError
from i2i_dist.official.names import Network, TensorsByName
from i2i_dist.official.networks import NETWORKS

# Methods whose code keeps all networks in one file.
IN_ONE_FILE = frozenset({"ugatit"})
# Methods whose code numbers files by iterations.
BY_ITERATION = frozenset({"stargan", "matchgan"})
# CycleGAN is published as one generator for each direction, under the name that the authors' one-way test reads.
LONE_GENERATOR = {"cyclegan": ("G", "G_A")}

_NAMED = 6  # of a list of names in a message


class Found(NamedTuple):
    """Official networks as they were found.

    Attributes:
        tensors: Network -> its tensors by their official names.
        places: Network -> the name of its file, or of its part of a file, for messages.
        unread: Names of files, or of parts, that are of no network of the method.
    """

    tensors: Mapping[str, TensorsByName]
    places: dict[str, str]
    unread: list[str]


def read(name: str, source: Path, epoch: str | None) -> Found:
    """Read those networks of a method that are there, among them a generator.

    Args:
        name: The method.
        source: The directory.
        epoch: Which of several checkpoints; None for the latest or, of files for all networks, the only one.

    Raises:
        ConfigError: There is no generator of this method and epoch, or not all that it needs.
        CheckpointError: A file cannot be read.
    """
    if not os.path.isdir(source):
        raise ConfigError(f"{source} is no directory; expected one with files such as {_example(name, epoch)}")
    if name in IN_ONE_FILE:
        return _read_one_file(name, source, epoch)
    if name in BY_ITERATION and epoch is None:
        suffix = _suffix(name, _generators(NETWORKS[name])[0])
        there = [path.name.removesuffix(suffix) for path in source.glob(f"*{suffix}")]
        epoch = max((number for number in there if number.isdecimal()), key=int, default=None)
    return _read_files(name, source, _epoch(name, epoch))


def write(name: str, directory: Path, dataset: str, epoch: str | None, networks: Mapping[str, Any]) -> None:
    """Write networks, tensors by official name, into a directory; `dataset` is how a file of all of them begins.

    Raises:
        ConfigError: The method's code does not know such an epoch.
    """
    epoch = _epoch(name, epoch)
    if name in IN_ONE_FILE:
        torch.save(dict(networks), directory / f"{dataset}_params_{_numbered(epoch)}.pt")
        return
    for key, tensors in networks.items():
        torch.save(tensors, directory / f"{epoch}{_suffix(name, key)}")


def _epoch(name: str, epoch: str | None) -> str:
    """Return the epoch that a file's name has: of None the one that the official code reads if nothing is said."""
    if name not in BY_ITERATION:
        return epoch or "latest"
    if epoch is not None and not epoch.isdecimal():
        raise ConfigError(f"--epoch: given {epoch}, allowed for {name} is the number of an iteration, such as 200000")
    return epoch or "200000"


def _suffix(name: str, key: str) -> str:
    """Return what follows the epoch in the name of a network's file."""
    return f"-{key}.ckpt" if name in BY_ITERATION else f"_net_{key}.pth"


def _example(name: str, epoch: str | None) -> str:
    if name in IN_ONE_FILE:
        return f"DATASET_params_{_numbered(epoch or 'latest')}.pt"
    return _epoch(name, epoch) + _suffix(name, next(iter(NETWORKS[name])))


def _generators(networks: Mapping[str, Network]) -> list[str]:
    return [key for key, network in networks.items() if network.direction]


def _read_files(name: str, source: Path, epoch: str) -> Found:
    networks = NETWORKS[name]
    files = {key: source / f"{epoch}{_suffix(name, key)}" for key in networks}
    files = {key: path for key, path in files.items() if os.path.isfile(path)}
    generators = _generators(networks)
    if not files.keys() & set(generators) and name in LONE_GENERATOR:
        lone, key = LONE_GENERATOR[name]
        generators.append(lone)
        if os.path.isfile(path := source / f"{epoch}{_suffix(name, lone)}"):
            files = {key: path} | files
    there = sorted(path.name for path in source.glob(f"*{_suffix(name, '*')}"))
    if not files.keys() & set(generators):
        wanted = " or ".join(f"{epoch}{_suffix(name, key)}" for key in generators)
        raise ConfigError(f"{source} has no {wanted}, the generator of {name}; such files there: {listed(there)}")
    for key, network in networks.items():
        if network.needed and key not in files:
            raise ConfigError(
                f"{source} has no {epoch}{_suffix(name, key)}, which {name} translates with beside the generator; "
                f"such files there: {listed(there)}"
            )
    read = {path.name for path in files.values()}
    begin = epoch + _suffix(name, "*").partition("*")[0]
    others = [file for file in there if file.startswith(begin) and file not in read]
    tensors = {key: _tensors(str(path), _load(path)) for key, path in files.items()}
    return Found(tensors, {key: path.name for key, path in files.items()}, others)


def _read_one_file(name: str, source: Path, epoch: str | None) -> Found:
    networks = NETWORKS[name]
    there = sorted(path.name for path in source.glob("*_params_*.pt"))
    fitting = [file for file in there if epoch is None or file.endswith(f"_params_{_numbered(epoch)}.pt")]
    if not fitting:
        raise ConfigError(f"{source} has no {_example(name, epoch)}; such files there: {listed(there)}")
    if len(fitting) > 1:
        raise ConfigError(
            f"{source} has several files that fit: {listed(fitting)}; name one by --epoch, which is what stands after "
            "_params_, or put it into a directory of its own"
        )
    path = source / fitting[0]
    parts = _load(path)
    tensors = {
        key: _tensors(f"{path}: {key}", part)
        for key, part in _named(str(path), parts, "networks").items()
        if key in networks
    }
    generators = _generators(networks)
    if not tensors.keys() & set(generators):
        wanted = " or ".join(generators)
        raise ConfigError(f"{path} has no {wanted}, the generators of {name}; there are: {listed(sorted(parts))}")
    places = {key: f"{path.name}: {key}" for key in tensors}
    return Found(tensors, places, [key for key in parts if key not in networks])


def _numbered(epoch: str) -> str:
    """Return an epoch as a file of all networks has it: numbers have seven digits."""
    return epoch.zfill(7) if epoch.isdecimal() else epoch


def _load(path: Path) -> Any:
    """Read a file, without running anything that is in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own text tells how to run what is in the file
        raise CheckpointError(f"{path} is damaged, or holds more than tensors, which is not loaded") from None
    except Exception as error:  # damaged bytes can make the reader raise anything
        first_line = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged, or no file of tensors: {first_line}") from None


def _named(place: str, loaded: Any, kind: str) -> dict[Any, Any]:
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{place} does not hold {kind} by name, but a {type(loaded).__name__} of something else")
    return loaded


def _tensors(place: str, loaded: Any) -> dict[str, Tensor]:
    """Return what was loaded if it is tensors by name; a prefix from DataParallel is removed."""
    for key, tensor in _named(place, loaded, "tensors").items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{place}: the entry {key!r} of type {kind} is no tensor with a name")
        if not _is_plain(tensor):
            raise CheckpointError(f"{place}: {key} is no dense tensor of float32 (or int64, for a count)")
    prefix = "module."
    if all(key.startswith(prefix) for key in loaded):
        return {key[len(prefix) :]: tensor for key, tensor in loaded.items()}
    return dict(loaded)


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.dtype not in (torch.float32, torch.int64):
        return False
    # A few bytes can pretend to be a tensor of any size: no device, or strides of 0.
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def listed(words: Sequence[Any]) -> str:
    """Return names for a message: the first few, printable, and how many there are."""
    more = f", ... ({len(words)} in all)" if len(words) > _NAMED else ""
    texts = [word if isinstance(word, str) and word.isprintable() else repr(word) for word in words[:_NAMED]]
    return (", ".join(texts) or "none") + more
