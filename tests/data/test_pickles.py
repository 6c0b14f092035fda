"""Nothing in a data set is ever unpickled: what would run a program there is passed over, replaced or refused."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from i2i_dist.data.batch import HostBatch
from i2i_dist.data.folders import open_source
from i2i_dist.data.index import load_index
from i2i_dist.data.pack import pack
from i2i_dist.data.reader import micro_batches
from tests.data.builders import encoded, noise, reader_of, write_folder, write_tar

NAMES = ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "joblib", "dill"]


class _Bait:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def bait(kind: str, canary: Path) -> bytes:
    stream = io.BytesIO()
    if kind in ("npy", "npz"):
        objects = np.array([_Bait(canary)], dtype=object)
        np.save(stream, objects, allow_pickle=True) if kind == "npy" else np.savez(stream, a=objects)
    elif kind in ("pt", "pth"):
        torch.save(_Bait(canary), stream)
    else:
        stream.write(pickle.dumps(_Bait(canary)))
    return stream.getvalue()


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def read_all(root: Path) -> list[HostBatch]:
    """Through a reading process, as in training."""
    return list(
        micro_batches(
            reader_of(root), global_batch=4, micro_batch=4, rank=0, world=1, start=0, stop=8, workers=1
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_the_bait_works(kind: str, canary: Path) -> None:
    content = io.BytesIO(bait(kind, canary))
    if kind in ("npy", "npz"):
        loaded = np.load(content, allow_pickle=True)
        _ = loaded["a"] if kind == "npz" else loaded
    elif kind in ("pt", "pth"):
        torch.load(content, weights_only=False)
    else:
        pickle.load(content)
    assert canary.exists()


def test_pickles_beside_the_pictures_and_in_their_place_are_never_opened(tmp_path: Path, canary: Path) -> None:
    """In shards whose index is valid: it is the one made of them, with the checksums of the pickles."""
    root = tmp_path / "data"
    members = [(f"{number}.png", encoded(noise(number))) for number in range(4)]
    members += [(f"3.{kind}", bait(kind, canary)) for kind in NAMES]
    members += [(f"as_{kind}.png", bait(kind, canary)) for kind in NAMES]
    write_tar(root / "trainA" / "x.tar", members)
    write_folder(root / "trainB", 4)
    for kind in NAMES:
        (root / "trainB" / f"0.{kind}").write_bytes(bait(kind, canary))
        (root / "trainB" / f"as_{kind}.jpg").write_bytes(bait(kind, canary))
    source = open_source(root, "trainA")
    assert (root / "trainA" / "index.npz").exists()
    assert sorted(source.keys) == sorted([*"0123", *(f"as_{kind}" for kind in NAMES)])
    for number, key in enumerate(source.keys):
        assert source.read(number)[0] == key  # the checksums agree
    bad = {(sample.domain, sample.key): sample.reason for batch in read_all(root) for sample in batch.bad}
    assert {domain for domain, _ in bad} == {"a", "b"}
    assert all(reason.startswith("not an image (") for reason in bad.values()), bad
    pack(root, tmp_path / "packed")
    assert not canary.exists()


@pytest.mark.parametrize("table", ["shards", "damage", "offsets", "key_text", "attributes", "format"])
def test_an_index_with_a_pickle_in_it_is_refused(tmp_path: Path, canary: Path, table: str) -> None:
    write_tar(tmp_path / "trainA" / "x.tar", [("0.png", encoded(noise(0)))])
    open_source(tmp_path, "trainA")
    stored = tmp_path / "trainA" / "index.npz"
    with np.load(stored) as tables:
        changed = dict(tables) | {table: np.array([_Bait(canary)], dtype=object)}
    if table == "attributes":
        changed["labels"] = np.zeros((1, 1), dtype=np.int8)
    np.savez(stored, **changed)
    with pytest.raises(ValueError, match=r"The index .*index\.npz cannot be used .* Delete it"):
        load_index(stored)
    stored.write_bytes(pickle.dumps(_Bait(canary)))
    with pytest.raises(ValueError, match=r"The index .*index\.npz cannot be used .* Delete it"):
        load_index(stored)
    assert not canary.exists()
