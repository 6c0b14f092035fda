"""Every file of configs/ trains: two updates of it, shrunk, through the launcher's own code.

Most files differ in their data set or in what shrinking replaces. Those that come to the same run are run once.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

from i2i_dist import config
from i2i_dist.checkpoint import directory_name
from i2i_dist.method import Gauged
from i2i_dist.methods import METHODS, resolve
from tests.methods.cases import CASES
from tests.methods.cases.common import SIZE
from tests.ranks import ROOT
from tests.train.runs import checkpoints, finish, rows, settings, start_ranks
from tests.updates import small_method

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# What small networks and images are trained with, whatever the files say.
SHORT = {
    "data__load_size": SIZE + 4, "data__crop_size": SIZE, "data__workers": 0,
    "output__sample_images": 1, "output__metrics_port": None,
}  # fmt: skip


def method_of(path: Path) -> str:
    return str(config.load(path).method["name"])


@functools.cache
def batch_of(path: Path) -> int:
    return max(2, small_method(method_of(path)).group)


def schedule(batch: int) -> dict[str, object]:
    """Return two epochs of one update each, of which the second is in the schedule's decay."""
    return {
        "schedule__epoch_images": batch, "schedule__constant_epochs": 1, "schedule__decay_epochs": 1,
        "train__global_batch": batch, "output__log_every_images": batch,
    }  # fmt: skip


def shrunk(path: Path) -> dict[str, object]:
    """Return the sizes of the method's small version; what the file's preset is about stays."""
    method = config.load(path).method
    method_class = METHODS[method["name"]]
    preset = method_class.PRESETS[method.get("preset", "official")]
    small = {key: value for key, value in CASES[method["name"]].small.items() if key not in preset}
    if "critic_turns" in method_class.Config.model_fields:
        small |= {"critic_turns": 1}  # in two updates the generator would not have its turn
    return {f"method__{key}": value for key, value in small.items()}


def words_for(path: Path, root: str) -> list[str]:
    return ["--config", str(path), *settings(**SHORT, **schedule(batch_of(path)), **shrunk(path), data__root=root)]


def one_of_each() -> list[Path]:
    """Return the first of those files that resolve to the same run."""
    runs: dict[str, Path] = {}
    for path in CONFIGS:
        loaded = config.load(path, words_for(path, "somewhere")[3::2])
        runs.setdefault(config.dump(loaded, resolve(loaded.method)[1]), path)
    return list(runs.values())


def test_the_files_that_are_run_stand_for_all() -> None:
    chosen = one_of_each()
    assert {config.load(path).method["name"] for path in chosen} == METHODS.keys()
    assert len(METHODS) <= len(chosen) < len(CONFIGS)


@pytest.mark.parametrize("path", one_of_each(), ids=lambda path: path.stem)
def test_every_configuration_trains(path: Path, data: Path, labelled_data: Path, tmp_path: Path) -> None:
    labelled, batch = "attributes" in METHODS[method_of(path)].Config.model_fields, batch_of(path)
    words = [*words_for(path, str(labelled_data if labelled else data)), "--run", str(tmp_path / "run")]
    codes, (text,) = finish(start_ranks(1, words, tmp_path / "log"))
    assert codes == [0], text
    found = rows(tmp_path / "run")
    assert [row["images_seen"] for row in found] == [batch, 2 * batch]
    assert all(math.isfinite(loss) for row in found for loss in row["losses"].values())
    assert all(math.isfinite(value) for row in found for value in row["gauges"].values())
    method_class, method_config = resolve(config.load(tmp_path / "run" / "config.yaml").method)
    with torch.device("meta"):
        method = method_class(method_config, torch.Generator())
    fakes = {f"{fake}_{what}" for fake in method.fakes for what in ("spread", "change")}
    own = method.gauges().keys() if isinstance(method, Gauged) else set()
    assert found[-1]["gauges"].keys() == {"critic_pull", "critic_doubt", *fakes, *own}
    assert "dropped" not in text
    assert checkpoints(tmp_path / "run") == [directory_name(2 * batch)]
    samples = {sheet.stem for sheet in (tmp_path / "run" / "samples").glob("*.png")}
    assert samples == {directory_name(0), directory_name(2 * batch)}


def test_a_share_that_leaves_no_picture_without_labels_is_refused(labelled_data: Path, tmp_path: Path) -> None:
    words = settings(**SHORT, data__root=str(labelled_data), train__global_batch=4, method__labelled_fraction=0.99)
    words += settings(
        **{f"method__{key}": value for key, value in CASES["matchgan"].small.items() if key != "labelled_fraction"}
    )
    words = ["--config", str(ROOT / "configs/matchgan_celeba.yaml"), *words, "--run", str(tmp_path / "run")]
    codes, (text,) = finish(start_ranks(1, words, tmp_path / "log"))
    assert codes == [2], text
    assert "all 16 pictures are labelled" in text and "lower method.labelled_fraction, or set it to 1" in text
