"""Whole runs on one GPU: they are killed and go on, and the optimizer's state may live in the host's memory."""

from __future__ import annotations

import itertools
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.needs import GPU
from tests.train.runs import SCRIPT, Started, checkpoints, launch, rows, settings

pytestmark = GPU

# GPUs add in no fixed order: what two runs have in common is told by slow training.
SLOWLY = settings(train__precision="fp32", method__lr=1e-6, method__lr_heads=1e-6)
IMAGES = 3 * 8
TOLERANCE = 1e-2  # of a loss; those of other pictures, or of weights that training has changed, are further off


def started(config: Path, run: Path, **values: Any) -> Started:
    words = [sys.executable, SCRIPT, "--config", str(config), *SLOWLY, *settings(**values), "--run", str(run)]
    return launch(words, run.with_suffix(".log"))


def losses(run: Path) -> list[dict[str, float]]:
    found = rows(run)
    assert [row["images_seen"] for row in found] == list(range(2, IMAGES + 1, 2))
    return [row["losses"] for row in found]


@pytest.fixture(scope="module")
def whole(dclgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    process = started(dclgan, run)
    assert process.wait() == 0, process.text
    assert "1 rank on cuda" in process.text
    found = [loss["nce_ab"] for loss in losses(run)]
    assert all(abs(one / other - 1) > TOLERANCE for one, other in itertools.pairwise(found)), "pictures look alike"
    return run


def test_killed_and_resumed_sees_the_same(whole: Path, dclgan: Path, tmp_path: Path) -> None:
    """Also the same as without processes that read, from whose memory pictures are copied to the GPU without a wait."""
    run = tmp_path / "killed"
    killed = started(dclgan, run, data__workers=2)
    killed.wait_for("Saved ")
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    resumed = started(dclgan, run, data__workers=2)
    assert resumed.wait() == 0 and "resumes at image" in resumed.text, resumed.text
    assert checkpoints(run) == checkpoints(whole)
    for found, expected in zip(losses(run), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing(whole: Path, dclgan: Path, tmp_path: Path, stage: int) -> None:
    run = tmp_path / "offloaded"
    stages = {"engine__generator_stage": stage, "engine__discriminator_stage": stage}
    process = started(dclgan, run, **stages, engine__generator_offload=True, engine__discriminator_offload=True)
    assert process.wait() == 0, process.text
    for found, expected in zip(losses(run), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
