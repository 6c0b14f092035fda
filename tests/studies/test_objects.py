"""The study of objects: both methods train alike, and the score is what is read off all translations."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2i_dist import config
from i2i_dist.config import RunConfig
from i2i_dist.data.synthetic_objects import render, scenes
from i2i_dist.methods import resolve
from i2i_dist.studies import objects as study
from tests.ranks import ROOT

SIZE = 32


def options(**changes: Any) -> Namespace:
    return Namespace(**vars(study._parser().parse_args([])) | changes)


class Knowing:
    """A method that knows the test pictures by heart, and answers with the truth of the scene `by` before."""

    def __init__(self, by: int = 0) -> None:
        self.generator, self.by = nn.Identity(), by

    def translate(self, image: Tensor, direction: str) -> Tensor:
        assert image.dtype == torch.float32 and image.min() >= -1 and image.max() <= 1
        target = "b" if direction == "a_to_b" else "a"
        shown = scenes(study._SEED, "testA" if target == "b" else "testB", study._TEST)
        source = "a" if target == "b" else "b"
        assert torch.equal(image, self.as_images([render(scene, source, SIZE) for scene in shown]))  # type: ignore[arg-type]
        return self.as_images([render(scene, target, SIZE) for scene in shown]).roll(self.by, 0)  # type: ignore[arg-type]

    @staticmethod
    def as_images(pictures: list[Any]) -> Tensor:
        return torch.stack([torch.from_numpy(one) for one in pictures]).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def test_both_methods_train_alike(tmp_path: Path) -> None:
    sections = [study.configuration(name, 3, tmp_path, options()) for name in study.METHODS]
    resolved = []
    for section in sections:
        whole = config.validate(RunConfig, section)
        assert whole.train.seed == 3
        assert whole.schedule.epoch_images is not None
        assert whole.schedule.epoch_images * study._EPOCHS == options().images
        resolved.append(resolve(section["method"])[1].model_dump())
    cyclegan, opgan = resolved
    assert {key: value for key, value in sections[0].items() if key != "method"} == {
        key: value for key, value in sections[1].items() if key != "method"
    }
    for key in ("width", "blocks", "critic_width", "lr", "betas", "pool_size", "lambda_gan"):
        assert cyclegan[key] == opgan[key]
    assert cyclegan["lambda_cycle_a"] == cyclegan["lambda_cycle_b"] == opgan["lambda_cycle"]
    assert (cyclegan["lambda_identity"], cyclegan["adversarial"]) == (0.0, "lsgan")


def test_the_score_is_what_is_read_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_TEST", 6)
    known: Any = Knowing()
    assert study.score(known, SIZE) == {"iou a": 1.0, "error a": 0.0, "iou b": 1.0, "error b": 0.0}
    wrong, untouched = study.score(Knowing(1), SIZE), study.score(None, SIZE)  # type: ignore[arg-type]
    for domain in "ab":
        assert wrong[f"iou {domain}"] < 0.5 and 0 < wrong[f"error {domain}"] < 0.3
        assert untouched[f"iou {domain}"] == 0.0 and untouched[f"error {domain}"] > 0.4


def test_the_table_and_the_file_have_every_seed_and_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(study, "_TEST", 6)
    monkeypatch.setattr(study, "train_all", lambda folder, runs, jobs: trained.extend(runs))
    monkeypatch.setattr(study, "load_method", lambda run: Knowing(int("cyclegan" in run.name)))
    words = ["--folder", str(tmp_path), "--seeds", "2", "--pictures", "2", "--size", str(SIZE), "--jobs", "1"]
    assert study.main(words) == 0
    assert trained == ["cyclegan_0", "opgan_0", "cyclegan_1", "opgan_1"]
    assert len(list((tmp_path / "pictures" / "trainB").glob("*.png"))) == 2
    out = capsys.readouterr().out.splitlines()
    assert " ".join(out[0].split()) == "method seed iou A to B iou B to A error A to B error B to A"
    assert "opgan       mean         1.000         1.000         0.000         0.000" in out
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [(row["name"], row["seed"]) for row in stored["results"]] == [
        ("cyclegan", 0), ("cyclegan", 1), ("opgan", 0), ("opgan", 1), ("untouched", None),
    ]  # fmt: skip
    assert stored["results"][2]["scores"]["iou b"] == 1.0 > stored["results"][0]["scores"]["iou b"]
    assert stored["settings"]["seeds"] == 2


def test_a_run_that_fails_ends_the_study_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(study, "_TEST", 1)
    monkeypatch.setattr(subprocess, "run", fail)
    assert study.main(["--folder", str(tmp_path), "--seeds", "1", "--pictures", "2"]) == 1
    assert "objects: failed, cyclegan_0 ended with exit code 2; " in capsys.readouterr().err


@pytest.mark.soak
def test_the_whole_study(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "i2i_dist.studies.objects", "--folder", str(tmp_path), "--seeds", "1"]
    command += ["--images", "40", "--pictures", "10", "--width", "4", "--blocks", "1", "--size", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 3
