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

from i2i_dist.bench import eager_dclgan, eager_ugatit, facts, step
from i2i_dist.bench.forms import Form, Reply, Request, Size
from i2i_dist.bench.timing import count_started
from i2i_dist.draws import Draws
from i2i_dist.losses.patch_nce import patch_nce
from i2i_dist.methods import resolve
from tests import official_ugatit
from tests.ranks import rank_environment

ROOT = Path(__file__).parents[2]


# The deepest critic of U-GAT-IT takes no smaller images.
SIZES = {"dclgan": 32, "ugatit": 96}
TITLES = {
    "dclgan": "One DCLGAN training step, preset official",
    "ugatit": "One U-GAT-IT light training step, preset of",
}


# Each takes 15 to 30 s of the processor. That the networks of the eager U-GAT-IT are the official ones is tested below.
QUICK, SLOW = [("dclgan", 2)], [("dclgan", 1), ("ugatit", 1), ("ugatit", 2)]


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(one, marks=pytest.mark.soak) for one in SLOW)], ids=str)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    target = tmp_path_factory.mktemp("bench") / "step.json"
    method, batch = request.param
    options = ["--width", "4", "--rounds", "1", "--json", str(target), "--batch", str(batch)]
    options += ["--size", str(SIZES[method]), *([] if method == "dclgan" else ["--method", method])]
    # As if a launcher had started it: the bench is one rank all the same.
    environment = rank_environment(rank=1, world=2, port=1)
    command = [sys.executable, str(ROOT / "launchers" / "bench.py"), "step", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(target.read_text())


def test_the_table_says_what_was_measured_and_where(bench: tuple[str, dict[str, Any]]) -> None:
    table, result = bench
    method, batch, size = (result["setting"][key] for key in ("method", "batch", "size"))
    launches = [form["launches"] for form in result["forms"]]
    for words in (
        TITLES[method],
        f"{size} x {size}, batch {batch}, width 4",
        "threads 1",
        "ours   fp32",
        "eager  fp32",
        f"GiB      {launches[0]}\n",
        f"GiB      {launches[1]}\n",
        "operators: ATen operators that compute, as they are dispatched",
        f", {launches[1] / launches[0]:.2f} of the operators\n",
        f"losses at batch {batch} agree",
    ):
        assert words in table
    assert torch.__version__ in table
    assert ("Negatives: the patches of the whole batch" in table) == (method == "dclgan" and batch > 1)


def test_the_file_holds_every_sample(bench: tuple[str, dict[str, Any]]) -> None:
    _, result = bench
    method, batch = result["setting"]["method"], result["setting"]["batch"]
    assert result["setting"] == {"method": method, "size": SIZES[method], "batch": batch, "width": 4, "rounds": 1}
    assert result["machine"].keys() == {"device", "threads", "torch", "commit"}
    for form in result["forms"]:
        assert len(form["seconds"]) == 1 and form["min"] == form["median"] == form["max"] > 0
        assert form["peak_memory_bytes"] > 0 and form["failure"] is None and form["method"] == method
    ours, eager = result["forms"][:2]
    assert (ours["name"], ours["precision"], eager["name"], eager["precision"]) == ("ours", "fp32", "eager", "fp32")
    assert result["time_ratio"] == pytest.approx(eager["median"] / ours["median"])
    assert result["memory_ratio"] == pytest.approx(eager["peak_memory_bytes"] / ours["peak_memory_bytes"])
    assert result["counted"][0] == "operators"
    assert eager["launches"] > ours["launches"] > 100
    assert result["launch_ratio"] == pytest.approx(eager["launches"] / ours["launches"])


def test_the_forms_agree_from_the_first_step(bench: tuple[str, dict[str, Any]]) -> None:
    _, result = bench
    agreement = result["agreement"]
    assert agreement["ours"].keys() == agreement["eager"].keys()
    assert len(agreement["ours"]) == {"dclgan": 8, "ugatit": 10}[result["setting"]["method"]]
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


def small_ugatit() -> eager_ugatit.EagerUGATIT:
    method, config = resolve({"name": "ugatit", "width": 4, "critic_width": 4, "light": True})
    return eager_ugatit.EagerUGATIT(method(config, torch.Generator().manual_seed(0)), torch.device("cpu"))  # type: ignore[arg-type]


def test_the_eager_form_of_ugatit_is_the_whole_step() -> None:
    """All its networks learn, are as large as those of the paper, and see as many images as there."""
    eager = small_ugatit()
    networks = {**eager.generators, **eager.critics}
    calls = dict.fromkeys(networks, 0)

    def count(name: str) -> None:
        calls[name] += 1

    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    for name, network in networks.items():
        network.register_forward_pre_hook(lambda *_, name=name: count(name))
    a, b = torch.rand(2, 1, 3, 96, 96).mul(2).sub(1)
    assert all(torch.isfinite(loss) for loss in eager.step(a, b, Draws(0, 0)).values())
    assert calls == dict.fromkeys(eager.generators, 4) | dict.fromkeys(eager.critics, 3)
    for name, network in networks.items():
        weights = [(p, old) for p, old in zip(network.parameters(), before[name], strict=True) if p.dim() > 1]
        assert not any(torch.equal(p, old) for p, old in weights if old.any()), name
    sizes = [eager_ugatit.Generator(64, 4), eager_ugatit.Critic(64, 5), eager_ugatit.Critic(64, 3)]
    assert [sum(p.numel() for p in m.parameters()) for m in sizes] == [10_589_888, 53_130_176, 3_290_560]


def test_the_eager_form_of_ugatit_saves_nothing_that_the_released_code_does_not() -> None:
    """Neither loss is kept from the networks of the other side, and both optimizers decay all weights."""
    eager = small_ugatit()
    a, b = torch.rand(2, 1, 3, 96, 96).mul(2).sub(1)
    eager._train_critics(a, b)
    assert all(p.grad is not None for p in eager.generators.parameters())
    eager.optimizer_d.zero_grad()
    eager._train_generators(a, b)
    assert all(p.grad is not None for p in eager.critics.parameters())
    for optimizer in (eager.optimizer_g, eager.optimizer_d):
        [group] = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.5, 0.999), 1e-4)


@torch.no_grad()
def test_the_eager_networks_of_ugatit_are_the_official_ones() -> None:
    """In fp64, where a variance divided by n instead of n - 1 would show."""
    eager = small_ugatit()
    eager.generators.double()
    eager.critics.double()
    image = torch.rand(2, 3, 96, 128, dtype=torch.float64).mul(2).sub(1)
    for generator in eager.generators.values():
        expected = official_ugatit.run_generator(generator.state_dict(), image)
        torch.testing.assert_close(tuple(generator(image)), expected, rtol=0, atol=1e-10)
    for critic in eager.critics.values():
        for state in (official_ugatit.iterated(critic.state_dict()), official_ugatit.iterated(critic.state_dict(), 2)):
            seen = critic(image)
            torch.testing.assert_close(tuple(seen[:2]), official_ugatit.run_critic(state, image), rtol=0, atol=1e-10)


def test_the_eager_form_keeps_rho_in_its_bounds() -> None:
    eager = small_ugatit()
    rhos = [p for name, p in eager.generators.named_parameters() if name.endswith(".rho")]
    with torch.no_grad():
        for rho in rhos:
            rho.copy_(torch.linspace(-1.0, 2.0, rho.numel()).view_as(rho))
    a, b = torch.rand(2, 1, 3, 96, 96).mul(2).sub(1)
    eager.step(a, b, Draws(0, 0))
    assert len(rhos) == 20 and all(rho.min() == 0 and rho.max() == 1 for rho in rhos)


def test_what_is_counted_on_a_cpu_is_what_computes() -> None:
    x = torch.ones(4, 6, requires_grad=True)
    cpu = torch.device("cpu")
    assert count_started(lambda: x.detach().view(24)[:3], cpu) == 0
    assert count_started(lambda: x.detach().view(24)[:3], cpu, views=True) == 3
    forward = count_started(lambda: (x.exp() + 1).sum(), cpu)
    assert count_started(lambda: (x.exp() + 1).sum().backward(), cpu) > forward == 3


def options(**changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return argparse.Namespace(**(vars(parser.parse_args(["--rounds", "2"])) | changes))


def gives_up(pipe: Connection, form: Form, size: Size, device: str) -> None:
    """Stands in for a form's process: ours answers; the eager form runs out of memory in its third step."""
    pipe.send(Reply(facts={"device": "none"}))
    number = 0
    while (request := pipe.recv()) is not None:
        if form.name == "eager" and number == 2:
            pipe.send(Reply(failure="RuntimeError: not enough memory"))
            return
        assert request == Request(2, counted=number == 3)
        pipe.send(Reply(0.5, {"nce_ab": 1.0}, 2**30, 77))
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
    [ours] = [line for line in printed.splitlines() if line.startswith("ours")]
    assert "0.500 (0.500 .. 0.500)" in ours and ours.endswith("1.00 GiB      77")
    assert "stopped: RuntimeError: not enough memory" in printed and "of the operators" not in printed


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
