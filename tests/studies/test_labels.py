"""The study of labels: both methods train alike, and the score is what the oracle says of all translations."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from i2i_dist import config
from i2i_dist.config import RunConfig
from i2i_dist.data.synthetic_labels import draw, label_space, read_labels
from i2i_dist.method import Labelled
from i2i_dist.methods import resolve
from i2i_dist.studies import labels as study
from tests.ranks import ROOT

CLASSES = label_space().classes


def options(**changes: Any) -> Namespace:
    return Namespace(**vars(study._parser().parse_args([])) | changes)


class Painter:
    """A method that paints what it is asked for, or always the same, over the picture."""

    def __init__(self, always: list[int] | None = None) -> None:
        self.generator, self.label_space, self._always = nn.Identity(), label_space(), always
        self.labelled_fraction, self.labelled_group = 1.0, None

    def translate_labelled(self, image: Tensor, labels: Tensor) -> Tensor:
        assert image.dtype == labels.dtype == torch.float32 and image.min() >= -1 and image.max() <= 1
        rng = np.random.default_rng(0)
        wanted = labels.int().numpy() if self._always is None else np.array([self._always] * len(image))
        painted = np.stack([draw(rng, label, image.shape[-1]) for label in wanted])
        return torch.from_numpy(painted).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def pictures(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([draw(rng, CLASSES[number % len(CLASSES)], 32) for number in range(count)])


@pytest.mark.parametrize("size", [32, 64])
def test_all_contestants_train_alike(size: int, tmp_path: Path) -> None:
    sections = [study.configuration(name, 3, tmp_path, options(size=size)) for name in study.CONTESTANTS]
    for section in sections:
        whole = config.validate(RunConfig, section)
        resolve(section["method"])
        assert whole.train.seed == 3
        assert whole.schedule.epoch_images is not None
        assert whole.schedule.epoch_images * 10 == options().images
    own = [{key: one["method"].pop(key, None) for key in ("name", "match_head")} for one in sections]
    assert [list(one.values()) for one in own] == [["stargan", None], ["matchgan", None], ["matchgan", "difference"]]
    assert sections[0] == sections[1] == sections[2]


def test_every_picture_is_translated_into_every_class() -> None:
    painter = Painter()
    assert isinstance(painter, Labelled)
    assert study.accuracy(painter, pictures(5), CLASSES) == dict.fromkeys(study.SCORES, 1.0)
    stubborn = study.accuracy(Painter(always=[0, 1, 0, 1, 0]), pictures(5), CLASSES)
    chance = {"colour": 1 / 3, "size": 1 / 2, "shape": 1 / 2, "whole": 1 / 12}
    assert stubborn == pytest.approx(chance)
    assert study.accuracy(None, pictures(7), CLASSES) == pytest.approx(chance)


def test_a_table_has_the_mean_of_several_runs() -> None:
    rows = [
        study.Scored("stargan", 0, dict.fromkeys(study.SCORES, 0.5)),
        study.Scored("stargan", 1, dict.fromkeys(study.SCORES, 0.75)),
        study.Scored("untouched", None, dict.fromkeys(study.SCORES, 0.125)),
    ]
    assert [line.split() for line in study.table(rows).splitlines()] == [
        ["method", "seed", "colour", "size", "shape", "whole"],
        ["stargan", "0"] + ["50.0%"] * 4,
        ["stargan", "1"] + ["75.0%"] * 4,
        ["stargan", "mean"] + ["62.5%"] * 4,
        ["untouched"] + ["12.5%"] * 4,
    ]
    assert len({len(line) for line in study.table(rows).splitlines()}) == 1


def test_the_study_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(study, "_TEST", 3)
    monkeypatch.setattr(study, "train_all", lambda folder, runs, jobs: trained.extend(runs))
    stubborn = Painter(always=CLASSES[0].tolist())
    painters = {"stargan": stubborn, "matchgan": Painter(), "difference": stubborn}
    monkeypatch.setattr(study, "load_method", lambda path: painters[path.name.split("_")[0]])
    assert study.main(["--folder", str(tmp_path), "--seeds", "2", "--pictures", "12", "--jobs", "1"]) == 0
    names = ("stargan", "matchgan", "difference")
    assert trained == [f"{name}_{seed}" for seed in (0, 1) for name in names]
    assert "matchgan    mean   100.0%" in capsys.readouterr().out
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [(row["name"], row["seed"]) for row in stored["results"]] == [
        *((name, seed) for name in names for seed in (0, 1)), ("untouched", None),
    ]  # fmt: skip
    assert [round(row["accuracy"]["whole"], 3) for row in stored["results"][:4]] == [0.083, 0.083, 1.0, 1.0]
    assert stored["settings"]["seeds"] == 2 and stored["settings"]["fraction"] == 0.2


def test_a_run_that_fails_ends_the_study_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(study, "_TEST", 1)
    monkeypatch.setattr(subprocess, "run", fail)
    assert study.main(["--folder", str(tmp_path), "--seeds", "1", "--pictures", "2"]) == 1
    assert "labels: failed, stargan_0 ended with exit code 2; " in capsys.readouterr().err


@pytest.mark.soak
def test_the_whole_study(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "i2i_dist.studies.labels", "--folder", str(tmp_path), "--seeds", "1"]
    command += ["--images", "160", "--pictures", "100", "--width", "4", "--blocks", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 4


def test_the_painter_paints_what_it_is_asked_for() -> None:
    labels = torch.from_numpy(CLASSES).float()
    painted = Painter().translate_labelled(torch.zeros(len(CLASSES), 3, 32, 32), labels)
    shown = ((painted + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert read_labels(shown).tolist() == CLASSES.tolist()
