"""The benchmark of the native ops: what it refuses, shows and fails for, and the page that is made from its figures."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist import ops
from i2i_dist.bench import chart, facts, kernel_cases, kernels, report, rivals, share, timing
from i2i_dist.bench.kernel_cases import Case, Form
from i2i_dist.bench.memory import peak_bytes

CPU = torch.device("cpu")
CASES = [
    Case("patch_nce", (2, 3, 16, 8)),
    Case("patch_nce", (1, 1, 16, 8), "bf16"),
    Case("adalin", (2, 4, 6, 5)),
    Case("iln", (2, 4, 6, 5), "bf16"),
    Case("instance_norm_act", (1, 4, 6, 5), channels_last=True),
    Case("patch_gather", (2, 3, 17, 16)),
]
RATES = {"copy": 1e10, "fp32": 1e11, "bf16": 1e11}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Small cases, one thread, nothing compiled, definitions in the place of kernels, rates that need no measuring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setenv("I2I_DIST_OPS", "reference")
    monkeypatch.setattr(kernels, "default_cases", lambda _: CASES)
    monkeypatch.setattr(kernels, "why_not_native", lambda *_: None)
    monkeypatch.setattr(kernels, "_rates", lambda *_: RATES)
    monkeypatch.setattr(kernels, "peak_bytes", lambda *_: 3 * 2**20)
    monkeypatch.setattr(kernels, "limit_memory", lambda: None)
    monkeypatch.setattr(
        kernel_cases, "_plain_forms", lambda function, leaves, products: [Form("eager", function, leaves)]
    )


def arguments(module: ModuleType, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(given)


def measure(*given: str) -> int:
    return kernels.run(arguments(kernels, "--seconds", "0", "--device", "cpu", *given))


def test_all_forms_of_all_ops_are_measured_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure("--json", str(tmp_path)) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [case["op"] for case in result["cases"]] == [case.op for case in CASES]
    assert {"device", "threads", "torch", "commit", "compiler", "clock"} == result["machine"].keys()
    printed = capsys.readouterr().out
    for case in result["cases"]:
        assert case["name"] in printed
        for row in case["rows"]:
            assert row["failure"] is None and row["runs"] == 3 and row["launches"] > 0
            assert row["error"] < kernels.LIMITS[case["precision"]]
            assert row["both"]["p20"] <= row["both"]["median"] <= row["both"]["p80"]
            assert row["share_of_floor"] == pytest.approx(case["floor"] / row["both"]["median"])
    nce, norm = result["cases"][0], result["cases"][4]
    assert [row["form"] for row in nce["rows"]] == ["eager", "attention, gradient only", "ours"]
    assert (
        nce["rows"][1]["gradient_only"] and nce["rows"][1]["backward"]["median"] < nce["rows"][1]["forward"]["median"]
    )
    assert [row["form"] for row in norm["rows"]] == ["eager", "eager, group norm", "ours"]


def test_runs_on_the_same_machine_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.json"
    for pattern in ("gather", "iln", "gather"):
        monkeypatch.setattr("sys.argv", ["bench.py", "kernels", "--cases", pattern])
        assert measure("--cases", pattern, "--json", str(file)) == 0
    result = json.loads(file.read_text())
    assert [case["op"] for case in result["cases"]] == ["iln", "patch_gather"]
    assert [command[-11:] for command in result["commands"]] == ["--cases iln", "ases gather"]
    file.write_text(json.dumps(result | {"machine": result["machine"] | {"commit": "another"}}))
    assert measure("--cases", "gather", "--json", str(file)) == 0
    assert [case["op"] for case in json.loads(file.read_text())["cases"]] == ["patch_gather"]


def test_cases_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure("--list", "--cases", "nce*bf16") == 0
    assert capsys.readouterr().out == "patch_nce 1x16 bf16\n"
    assert measure("--cases", "nothing") == 2
    assert "No case has 'nothing' in its name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "words"),
    [("reference", "I2I_DIST_OPS=reference is set"), ("auto", "that of adalin cannot run: it is not built.")],
)
def test_it_refuses_to_measure_anything_but_kernels(
    mode: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("I2I_DIST_OPS", mode)
    monkeypatch.setattr(ops, "choose", lambda *_: ops.Choice(False, "it is not built"))
    assert measure("--cases", "adalin 1x256x64x64") == 2
    assert words in capsys.readouterr().err


def test_the_process_demands_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("I2I_DIST_OPS", "auto")
    monkeypatch.setattr(ops, "choose", lambda *_: ops.Choice(True, "it is there"))
    assert kernels.why_not_native({"adalin"}, "cpu") is None
    assert os.environ["I2I_DIST_OPS"] == "native"


def out_of_memory(*_: Any) -> Tensor:
    raise RuntimeError("not enough memory\nand more lines")


def twice(features: Tensor, ids: Tensor) -> Tensor:
    return 2 * rivals_gather(features, ids)


rivals_gather = rivals.gather


def test_a_rival_that_fails_is_shown_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "gather", out_of_memory)
    assert measure("--cases", "gather") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eager"))
    assert line.endswith("failed: RuntimeError: not enough memory")


def test_a_form_that_computes_something_else_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "gather", twice)
    assert measure("--cases", "gather") == 1
    assert "it computes something else: an error of 1.0e+00 of at most 1e-04" in capsys.readouterr().out


def test_a_wrong_gradient_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled: Any = lambda gathered: gathered + (gathered - gathered.detach())  # noqa: E731
    monkeypatch.setattr(rivals, "gather", lambda *given: doubled(rivals_gather(*given)))
    assert measure("--cases", "gather") == 1


def test_ours_must_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "patch_gather", out_of_memory)
    assert measure("--cases", "gather") == 1


def test_the_floor_counts_what_must_be_done() -> None:
    nce = kernel_cases.build(Case("patch_nce", (2, 3, 16, 8)), CPU)
    assert nce.floor_operations == 2 * 3 * (2 * 16 * 16 * 8) * 2
    assert nce.floor_bytes == 3 * 2 * 3 * 16 * 8 * 4
    for op, maps in (("adalin", 8), ("iln", 8), ("instance_norm_act", 5)):
        assert kernel_cases.build(Case(op, (2, 4, 6, 5), "bf16"), CPU).floor_bytes == maps * 2 * 4 * 6 * 5 * 2
    gather = kernel_cases.build(Case("patch_gather", (1, 3, 17, 16)), CPU)
    assert gather.floor_bytes == (3 * 256 * 3 + 3 * 17 * 16) * 4


def test_the_exact_loss_is_that_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "CHECKED_ROWS", 5)
    problem = kernel_cases.build(Case("patch_nce", (2, 3, 16, 8)), CPU)
    queries = problem.forms[0].leaves
    keys = problem.exact.args[1]  # type: ignore[attr-defined]
    leaves = [query.detach().double().requires_grad_() for query in queries]
    loss = rivals.patch_nce(leaves, [key.double() for key in keys], groups=3)
    exact = problem.exact()
    torch.testing.assert_close(exact.output, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(list(exact.gradients), list(torch.autograd.grad(loss, leaves)))


def test_forms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds that have all of them, in changing order: the caches are as the one before has left them."""
    order: list[str] = []
    monkeypatch.setattr(timing, "MIN_ROUNDS", 20)
    timing.take_turns([lambda: order.append("a"), lambda: order.append("b")], seconds=0)
    rounds = ["".join(order[first : first + 2]) for first in range(0, 40, 2)]
    assert len(order) == 40 and set(rounds) == {"ab", "ba"}


def test_memory_is_that_of_the_form_named() -> None:
    case = Case("instance_norm_act", (1, 64, 128, 128))  # 4 MiB
    form = kernel_cases.build(case, CPU).forms[0]
    found = peak_bytes(case, form, None)
    assert found is not None and 2 * 4 * 2**20 <= found < 12 * 4 * 2**20
    assert peak_bytes(case, form._replace(name="none of them"), None) is None


def test_the_share_is_measured_around_every_call() -> None:
    network = share.AdaLINGenerator(4)
    image = torch.rand(1, 3, 16, 16)
    step: Any = lambda: F.l1_loss(network(image), image).backward()  # noqa: E731
    before, modes = ops.adalin, share.MODES
    found = share.measure("small", step, CPU, rounds=2)
    assert ops.adalin is before
    for mode in modes:
        calls = {op: row["calls"] for op, row in found[mode]["ops"].items()}
        assert calls == {"instance_norm_act": 3 + 8, "adalin": 8, "iln": 2}
        spent = [row[part] for row in found[mode]["ops"].values() for part in ("forward", "backward")]
        assert min(spent) > 0 and sum(spent) < found[mode]["total"]["p80"]
    assert os.environ["I2I_DIST_OPS"] == "reference"


def test_a_backward_is_timed_apart_from_what_follows() -> None:
    spans = share._Spans(CPU)
    layer, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.rand(4, 32, 64, 64)
    with spans.of_the_ops():
        y = share.ops.instance_norm_act(layer(x))
        layer(y).sum().backward()
    (row,) = spans.sums(1).values()
    assert row["calls"] == 1 and row["backward"] > 0
    assert layer.weight.grad is not None


def test_the_page_is_what_the_generator_makes() -> None:
    for name, text in report.generate(report.DOCS / "kernels").items():
        assert (report.DOCS / name).read_text() == text, f"docs/{name}: run `python launchers/bench.py report`"


def docs(folder: Path) -> Path:
    (folder / "kernels").mkdir()
    (folder / "kernels" / "template.md").write_text("{{figures}}\n\n{{share}}\n")
    return folder


def test_what_nobody_measured_is_said_to_be_so(tmp_path: Path) -> None:
    page = report.generate(docs(tmp_path) / "kernels")["kernels.md"]
    for device in ("CPU", "NVIDIA H200"):
        assert page.count(f"### {device}\n\nNot measured yet. `make bench-kernels`") == 2


def test_the_page_shows_every_case_and_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "gather", out_of_memory)
    folder = docs(tmp_path) / "kernels"
    assert measure("--json", str(folder)) == 0
    assert report.run(arguments(report, "--docs", str(tmp_path))) == 0
    page, plot = (tmp_path / "kernels.md").read_text(), (folder / "cpu.svg").read_text()
    result = json.loads((folder / "cpu.json").read_text())
    for case in result["cases"]:
        assert f"| {case['size']} {case['precision']} |" in page and f">{case['name']}<" in plot
    assert ">failed: eager<" in plot
    assert "failed: RuntimeError: not enough memory" in page and "(kernels/cpu.svg)" in page
    assert f"`{result['commands'][0]}`" in page and result["machine"]["commit"] in page
    assert page.count("Not measured yet") == 3


def test_the_plot_shows_times_relative_to_ours() -> None:
    row: Any = lambda form, time: {"form": form, "both": {"median": time}}  # noqa: E731
    assert chart.ratios({"rows": [row("eager", 6.0), row("ours", 2.0), {"form": "torch.compile"}]}) == {"eager": 3.0}
    assert chart.ratios({"rows": [row("eager", 6.0), {"form": "ours"}]}) == {}


def test_gpus_name_their_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert facts.json_path(tmp_path, torch.device("cuda"), ".json") == tmp_path / "h200.json"
    assert facts.json_path(tmp_path / "x.json", torch.device("cuda"), ".json") == tmp_path / "x.json"
