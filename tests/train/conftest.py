"""What the tests of whole runs share: a data set, configurations, and the end of every process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from i2i_dist.data.label_files import RAFD_EMOTIONS
from i2i_dist.data.labelled_domains import Labelling
from i2i_dist.data.pack import pack
from i2i_dist.data.synthetic import write_dataset
from i2i_dist.methods.stargan import Hyperparameters
from tests.train import runs

CELEBA = Hyperparameters().attributes


@pytest.fixture(scope="package", autouse=True)
def server() -> Iterator[None]:
    runs.start_server()
    yield
    runs.stop_server()


def lost_memory() -> set[str]:
    """Return the names of what processes have shared that are no more; torch puts their numbers into the names."""
    found = {path.name: re.match(r"torch_(\d+)_", path.name) for path in Path("/dev/shm").iterdir()}
    return {name for name, number in found.items() if number and not psutil.pid_exists(int(number[1]))}


@pytest.fixture(scope="module", autouse=True)
def nothing_left(server: None) -> Iterator[None]:
    """What a run has started ends with it, and the memory that its processes share is given back."""
    before = lost_memory()
    yield
    left = runs.left_behind()
    runs.kill_all()
    assert not left
    assert lost_memory() <= before


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, size=36, train=6, test=1, seed=3)
    return root


@pytest.fixture(scope="package")
def labelled_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that is said to show CelebA's hair colours, sex and age, and RaFD's emotions."""
    pictures, packed = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("labelled")
    rng, rows = np.random.default_rng(3), [["picture", *CELEBA, *RAFD_EMOTIONS]]
    for split, count in (("trainA", 16), ("testA", 1)):
        (pictures / split).mkdir()
        for number in range(count):
            name = f"{split}/{number}.png"
            Image.fromarray(rng.integers(256, size=(36, 36, 3), dtype=np.uint8)).save(pictures / name)
            hair, emotion = np.eye(4, dtype=int)[number % 4, :3], np.eye(8, dtype=int)[number % 8]
            rows.append([name, *map(str, [*hair, number % 2, 1, *emotion])])
    (pictures / "labels.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    pack(pictures, packed, overwrite=True, labelling=Labelling(csv=pictures / "labels.csv"))
    return packed


@pytest.fixture(scope="package")
def dclgan(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return runs.write_config(tmp_path_factory.mktemp("configuration") / "dclgan.yaml", data)


@pytest.fixture(scope="package")
def cyclegan(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return runs.write_config(tmp_path_factory.mktemp("configuration") / "cyclegan.yaml", data, "cyclegan")
