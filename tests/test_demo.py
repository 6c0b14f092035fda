"""The demonstration's score, on generators that cannot have learned anything, and the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from i2i_dist import demo, saver
from i2i_dist.checkpoint import State
from i2i_dist.data.synthetic import hidden_map, write_dataset
from i2i_dist.distributed import rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engines import Layout, SideEngine
from i2i_dist.method import SIDES
from i2i_dist.methods import resolve
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep
from tests.ranks import ROOT, run_ranks

SECTION = {"name": "cyclegan", "width": 4, "blocks": 1, "critic_width": 4, "pool_size": 0}


def save_untrained(directory: str) -> None:
    method_class, config = resolve(SECTION)
    method = method_class(config, torch.Generator().manual_seed(1))
    layout, groups = Layout(1, 1, rank_and_world()[1]), method.parameter_groups()
    sides = {side: SideEngine(getattr(method, side), groups[side], layout, torch.device("cpu")) for side in SIDES}
    state = State(2, 1, 1, {"method": config.model_dump(mode="json"), "train": {"seed": 0}}, {}, {})
    pools = ImagePools((), 0, 0)
    captured = saver.capture(sides, Ema(sides["generator"], 0))
    assert saver.write(Path(directory), state, captured, pools, Keep(1)) is None


def test_only_what_was_learned_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", size=32, train=1, test=6, seed=0)
    run_ranks(1, "tests.test_demo:save_untrained", tmp_path, str(tmp_path / "checkpoints"))
    assert not demo.report(tmp_path, tmp_path / "data")
    assert f"does not reach the margin of {demo.MARGIN:.0%}" in capsys.readouterr().out

    def all_but_perfect(method: object, pictures: np.ndarray) -> np.ndarray:
        mapped = hidden_map(pictures).astype(np.int64)
        return np.clip(mapped + (10 if next(calls) == 0 else 100), 0, 255).astype(np.uint8)

    calls = iter(range(2))  # first the trained generators, then the untrained ones
    monkeypatch.setattr(demo, "_translated", all_but_perfect)
    assert demo.report(tmp_path, tmp_path / "data")
    assert "beats all three baselines" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_demonstration_with_a_sentence() -> None:
    with pytest.raises(SystemExit, match=r"^demo: failed, -c ended with exit code 3; why stands above$"):
        demo._run(sys.executable, "-c", "raise SystemExit(3)")


@pytest.mark.soak
def test_the_whole_demonstration() -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "i2i_dist.demo"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("demo: ok runs/demo")
