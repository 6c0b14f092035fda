"""What the tests of whole runs share: a data set, configurations, and the end of every process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from i2i_dist.data.synthetic import write_dataset
from tests.train import runs


@pytest.fixture(scope="package", autouse=True)
def server() -> Iterator[None]:
    runs.start_server()
    yield
    runs.stop_server()


@pytest.fixture(scope="module", autouse=True)
def nothing_left(server: None) -> Iterator[None]:
    yield
    runs.kill_all()


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, size=36, train=6, test=1, seed=3)
    return root


@pytest.fixture(scope="package")
def dclgan(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return runs.write_config(tmp_path_factory.mktemp("configuration") / "dclgan.yaml", data)


@pytest.fixture(scope="package")
def cyclegan(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return runs.write_config(tmp_path_factory.mktemp("configuration") / "cyclegan.yaml", data, "cyclegan")
