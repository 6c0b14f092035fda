"""The measured forms of a step compute the same, and what stops one of them does not stop the measurement."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from i2i_dist.bench import eager_dclgan, facts, step
from i2i_dist.bench.forms import Form, Reply, Size
from i2i_dist.draws import Draws
from i2i_dist.losses.patch_nce import patch_nce
from i2i_dist.methods import resolve
from tests.ranks import rank_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[1, 2])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    target = tmp_path_factory.mktemp("bench") / "step.json"
    options = ["--size", "32", "--width", "4", "--rounds", "1", "--json", str(target), "--batch", str(request.param)]
    # As if a launcher had started it: the bench is one rank all the same.
    environment = rank_environment(rank=1, world=2, port=1)
    command = [sys.executable, str(ROOT / "launchers" / "bench.py"), "step", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(target.read_text())


def test_the_table_says_what_was_measured_and_where(bench: tuple[str, dict[str, Any]]) -> None:
    table, result = bench
    batch = result["setting"]["batch"]
    for words in (
        f"32 x 32, batch {batch}, width 4",
        "threads 1",
        "ours   fp32",
        "eager  fp32",
        "GiB",
        f"losses at batch {batch} agree",
    ):
        assert words in table
    assert torch.__version__ in table
    assert ("Negatives: the patches of the whole batch" in table) == (batch > 1)


def test_the_file_holds_every_sample(bench: tuple[str, dict[str, Any]]) -> None:
    _, result = bench
    assert result["setting"] in [{"size": 32, "batch": batch, "width": 4, "rounds": 1} for batch in (1, 2)]
    assert result["machine"].keys() == {"device", "threads", "torch", "commit"}
    for form in result["forms"]:
        assert len(form["seconds"]) == 1 and form["min"] == form["median"] == form["max"] > 0
        assert form["peak_memory_bytes"] > 0 and form["failure"] is None
    ours, eager = result["forms"][:2]
    assert (ours["name"], ours["precision"], eager["name"], eager["precision"]) == ("ours", "fp32", "eager", "fp32")
    assert result["time_ratio"] == pytest.approx(eager["median"] / ours["median"])
    assert result["memory_ratio"] == pytest.approx(eager["peak_memory_bytes"] / ours["peak_memory_bytes"])


def test_the_forms_agree_from_the_first_step(bench: tuple[str, dict[str, Any]]) -> None:
    _, result = bench
    agreement = result["agreement"]
    assert agreement["ours"].keys() == agreement["eager"].keys()
    assert len(agreement["ours"]) == 8
    assert agreement["relative_difference"] <= 1e-5


def test_the_eager_form_is_the_whole_step() -> None:
    """All its networks learn, its critics are as large as the paper's, and no network is left behind."""
    small = {"width": 4, "critic_width": 4, "head_dim": 16, "nce_patches": 16}
    method, config = resolve({"name": "dclgan", **small})
    eager = eager_dclgan.EagerDCLGAN(method(config, torch.Generator().manual_seed(0)), torch.device("cpu"))  # type: ignore[arg-type]
    networks = {name: getattr(eager, name) for name in ("g_ab", "g_ba", "h_a", "h_b", "d_a", "d_b")}
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    a, b = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1)
    losses = [eager.step(a, b, Draws(0, position)) for position in range(2)]
    assert all(torch.isfinite(loss) for terms in losses for loss in terms.values())
    for name, network in networks.items():
        weights = [(p, old) for p, old in zip(network.parameters(), before[name], strict=True) if p.dim() > 1]
        assert not any(torch.equal(p, old) for p, old in weights), (
            name
        )  # a bias before an instance norm has no gradient
    assert sum(p.numel() for p in eager_dclgan.critic(64).parameters()) == 2_764_737


def test_eager_patch_nce_takes_the_whole_batch_as_one_group() -> None:
    query, key = F.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=-1)  # six rows, say three of two images
    expected = patch_nce([query[None]], [key[None]], eps=1e-12)
    torch.testing.assert_close(eager_dclgan.patch_nce(query, key, 0.07), expected)


def options(**changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return argparse.Namespace(**(vars(parser.parse_args(["--rounds", "2"])) | changes))


def gives_up(pipe: Connection, form: Form, size: Size, device: str) -> None:
    """Stands in for a form's process: ours answers; the eager form runs out of memory in its third step."""
    pipe.send(Reply(facts={"device": "none"}))
    number = 0
    while pipe.recv():
        if form.name == "eager" and number == 2:
            pipe.send(Reply(failure="RuntimeError: not enough memory"))
            return
        pipe.send(Reply(0.5, {"nce_ab": 1.0}, 2**30))
        number += 1


def dies(pipe: Connection, form: Form, size: Size, device: str) -> None:
    pipe.send(Reply())
    pipe.recv()


def sleeps(pipe: Connection, form: Form, size: Size, device: str) -> None:
    pipe.send(Reply())
    pipe.recv()
    time.sleep(60)


def test_a_form_that_runs_out_of_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "serve", gives_up)
    assert step.run(options(batch=2)) == 0
    printed = capsys.readouterr().out
    assert "0.500 (0.500 .. 0.500)" in printed and "stopped: RuntimeError: not enough memory" in printed


@pytest.mark.parametrize(
    ("stand_in", "limit", "words"), [(dies, 60, "ended with status 0"), (sleeps, 1, "no answer within 1 s")]
)
def test_a_form_that_ends_or_hangs_is_reported(
    stand_in: Any, limit: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "serve", stand_in)
    assert step.run(options(step_limit=limit)) == 1  # ours is among them
    printed = capsys.readouterr().out
    assert printed.count(words) == 2 and "were not compared" in printed


def test_losses_that_differ_fail_the_measurement() -> None:
    agreement = step._compare({"nce_ab": 1.0, "gan_ab": 2.0}, {"nce_ab": 1.1, "gan_ab": 2.0})
    assert agreement is not None and agreement["term"] == "nce_ab"
    assert agreement["relative_difference"] == pytest.approx(1 / 11)
    assert "First losses at batch 3 DIFFER" in step._verdict(agreement, 3)


def test_the_commit_is_unknown_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "facts.py"))
    assert facts.commit() == "unknown"


def test_an_allocation_beyond_the_free_memory_is_an_error_not_the_end() -> None:
    code = (
        "import torch\nfrom i2i_dist.bench import memory\nmemory.limit_memory()\n"
        "try:\n    torch.ones(2**42)\nexcept RuntimeError as error:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "refused" in done.stdout
