"""An update taken apart on two ranks, and the model of it on many: what is counted is what is sent."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from i2i_dist.bench import collectives, cost_model, scaling, scaling_page, update_counts
from i2i_dist.bench.collectives import Noted, shares
from i2i_dist.bench.cost_model import FAST, GPUS, SLOW, Call, Link, predict, predict_here, sent, traffic
from i2i_dist.bench.report import DOCS
from i2i_dist.bench.scaling_rank import Done, Report, _on_a_core, _Taken
from i2i_dist.bench.scaling_tables import caveats, largest_batch, strong_cells
from i2i_dist.bench.update_counts import Counts, count, sketch
from i2i_dist.method import Side
from i2i_dist.methods import resolve
from tests.ranks import ROOT

# Networks with parameters on both sides of the size from which ZeRO 3 cuts them.
SMALL = {"width": 32, "blocks": 1, "critic_width": 16, "head_dim": 16, "nce_layers": "[down1, block1]"}
H100 = GPUS["h100"]


class Ran(NamedTuple):
    result: dict[str, Any]
    printed: str


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The command as a person gives it, on one rank and on two."""
    folder = tmp_path_factory.mktemp("scaling")
    words = ["--config", str(ROOT / "configs" / "demo.yaml"), "--ranks", "2", "--rounds", "1", "--json", str(folder)]
    for key, value in {"data.crop_size": 24, "data.load_size": 24, "train.global_batch": 1}.items():
        words += ["--set", f"{key}={value}"]
    for key, value in SMALL.items():
        words += ["--set", f"method.{key}={value}"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        assert scaling.run(options(*words)) == 0
    [path] = folder.iterdir()
    return Ran(json.loads(path.read_text()), "\n".join(lines))


def test_what_two_ranks_send_is_what_the_formula_says_at_every_stage(ran: Ran) -> None:
    """Every collective, and every byte but what pads a parameter to a multiple of the ranks."""
    traffic = ran.result["traffic"]
    assert [list(one["stages"].values()) for one in traffic] == [[stage, stage] for stage in range(4)]
    for one in traffic:
        assert one["counted"].keys() == one["formula"].keys()
        for kind, counted in one["counted"].items():
            assert one["formula"][kind]["calls"] == pytest.approx(counted["calls"]), (one["stages"], kind)
            assert 0 <= counted["bytes"] - one["formula"][kind]["bytes"] < 1e-4 * counted["bytes"] + 64
    elements = Counts.from_json(ran.result["counts"]).sides
    gradients = 4 * sum(side.elements for side in elements.values())
    assert traffic[0]["counted"]["all_reduce"]["bytes"] == gradients + 2 * 4  # and two flags
    assert traffic[1]["counted"]["all_gather"]["bytes"] == pytest.approx(gradients, abs=64)
    assert traffic[3]["counted"]["reduce_scatter"]["bytes"] == pytest.approx(gradients, abs=64)


def test_an_update_is_taken_apart_without_remainder(ran: Ran) -> None:
    alone, two = ran.result["worlds"]
    for one in (alone, two):
        parts = dict(one["parts"])
        assert parts.pop("whole") == pytest.approx(sum(parts.values())) and min(parts.values()) >= 0
        assert parts["computing"] > 0
    assert two["parts"]["communicating"] > alone["parts"]["communicating"] and "predicted" not in alone
    calls = [Call(**call) for call in two["calls"]]
    links = {kind: Link(**link) for kind, link in two["links"].items()}
    expected = predict_here(alone["seconds"], calls, 2, ran.result["machine"]["processors"], links)
    assert two["predicted"] == pytest.approx(expected)


def test_the_command_says_what_is_measured_and_what_is_a_model(ran: Ran) -> None:
    measured, _, predicted = ran.printed.partition("MODEL, not measured: H100 SXM 80 GB")
    assert "Measured; ms" in measured and "commit " in measured and "threads 1" in measured
    assert "4096" in predicted and "efficiency" in predicted and "docs/scaling.md" in predicted
    assert "10 µs" in predicted and "25 to 45 %" in predicted


def test_products_and_convolutions_are_counted_as_by_hand() -> None:
    """The first convolution passes no gradient on, the second and the product do."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, stride=2), nn.Flatten())
    net.append(nn.Linear(4 * 8 * 8, 5)).to("meta")
    with update_counts.Work() as work:
        net(torch.empty(2, 3, 16, 16, device="meta")).sum().backward()
    first, second, product = 8 * 3 * 9 * 256, 4 * 8 * 64, 4 * 64 * 5
    assert work.flops == 2 * 2 * (2 * first + 3 * second + 3 * product)


@functools.cache
def counts_of(name: str, size: int, **keys: Any) -> Counts:
    method_class, config = resolve({"name": name, **keys})
    return count(method_class, config, sketch(method_class, config).group, size)


def test_work_grows_with_the_pictures_and_parameters_do_not() -> None:
    small, large = (counts_of("cyclegan", size, width=8, blocks=1, critic_width=8) for size in (64, 128))
    assert 3.9 < large.flops / small.flops < 4.2 and 3.9 < large.saved_bytes / small.saved_bytes < 4.2
    assert small.sides == large.sides
    assert Counts.from_json(json.loads(json.dumps(small.as_json()))) == small


def test_collectives_of_the_networks_are_counted_too() -> None:
    """pix2pix's batch norms gather moments and sum gradients; its critic is called twice in its own turn."""
    counts = counts_of("pix2pix", 32, width=4, critic_width=4, downs=4)
    method = sketch(*resolve({"name": "pix2pix", "width": 4, "critic_width": 4, "downs": 4}))
    norms = {s: sum(type(m).__name__ == "BatchNorm" for m in getattr(method, s).modules()) for s in counts.sides}
    passes = norms["generator"] + 3 * norms["discriminator"]
    by_kind = {kind: sum(own.calls for own in counts.own if own.kind == kind) for kind in ("all_gather", "all_reduce")}
    assert passes > 0 and by_kind == {"all_gather": passes, "all_reduce": passes + 2}  # two flags
    critic = counts.sides["discriminator"]
    assert not critic.steady and set(critic.fetched[0]) == {5.0}  # each call and its backward, and the frozen pass
    assert counts.sides["generator"].steady


def test_turns_that_come_now_and_then_are_averaged() -> None:
    """StarGAN's generator steps in every fifth update; its penalty differentiates the critic twice."""
    counts = counts_of("stargan", 32, image_size=32, width=4, blocks=1, critic_width=4, critic_layers=3)
    assert (counts.sides["generator"].steps, counts.sides["discriminator"].steps) == (pytest.approx(0.2), 1.0)
    calls = traffic(counts, {"generator": 0, "discriminator": 0}, 8)
    sums = sum(call.calls * call.bytes for call in calls if call.bytes > 4)
    assert sums == pytest.approx(
        4 * (0.2 * counts.sides["generator"].elements + counts.sides["discriminator"].elements)
    )


def test_a_ring_sends_what_it_must() -> None:
    assert sent(Call("all_reduce", 100.0, 2), 4) == 2 * 2 * 100 * 3 / 4
    assert sent(Call("all_gather", 100.0, 1), 4) == sent(Call("reduce_scatter", 100.0, 1), 4) == 75
    assert sent(Call("all_reduce", 100.0, 1), 1) == 0
    seconds = cost_model.collective_seconds(Call("all_reduce", 1e10, 1), 8, H100, 1.0)
    assert seconds == pytest.approx(2 * 1e10 * 7 / 8 / 450e9, rel=1e-2)  # latency is nothing beside it


@pytest.mark.parametrize("stage", range(4))
def test_more_gpus_never_help_efficiency_and_more_bandwidth_never_hurts(stage: int) -> None:
    counts = counts_of("cyclegan", 64, width=8, blocks=1, critic_width=8)
    stages: dict[Side, int] = {"generator": stage, "discriminator": stage}
    found = [predict(counts, 1, world, H100, FAST, stages) for world in (1, 2, 8, 16, 64, 512, 4096)]
    efficiencies = [one.efficiency for one in found]
    assert efficiencies[0] == 1 and efficiencies == sorted(efficiencies, reverse=True)
    for world in (8, 64):
        times = []
        for rate in (0.5, 1.0, 2.0):
            gpu = H100._replace(nvlink=rate * H100.nvlink, network=rate * H100.network)
            times.append(predict(counts, 1, world, gpu, FAST, stages).communicating)
        assert times == sorted(times, reverse=True) and times[0] > times[-1]
    slow, fast = (predict(counts, 1, 8, H100, assumed, stages) for assumed in (SLOW, FAST))
    assert slow.images_per_second < fast.images_per_second


def test_a_fixed_batch_cannot_be_cut_below_a_group() -> None:
    counts = counts_of("cyclegan", 64, width=8, blocks=1, critic_width=8)
    assert len(strong_cells(counts, H100, {"generator": 0, "discriminator": 0})) == 4
    pairs = counts._replace(batch=2)
    assert strong_cells(pairs, H100, {"generator": 0, "discriminator": 0})[-1] == "no whole group"
    each = counts.saved_bytes
    assert largest_batch(counts, 0, 4.5 * each / 0.8) == 4 and largest_batch(counts, 0, 0.5 * each) is None
    assert largest_batch(counts._replace(batch=16), 0, 1000 * each) == 16


def test_waiting_ends_when_the_last_rank_comes() -> None:
    """The second rank comes 2 s late to the first collective; of the second one the first rank leaves early."""
    one = [Noted("all_reduce", 4, 1.0, 4.0, 0.1), Noted("broadcast", 4, 5.0, 5.5, 0.1)]
    two = [Noted("all_reduce", 4, 3.0, 4.0, 0.1), Noted("broadcast", 4, 6.0, 6.5, 0.1)]
    first, second = shares([one, two])
    assert (first.waiting, first.communicating) == (2.5, 1.0)
    assert (second.waiting, second.communicating) == (0.0, 1.5)
    with pytest.raises(ValueError, match="of other kinds"):
        shares([one, two[:1]])


def test_a_collective_may_end_before_its_method_returns() -> None:
    """As NCCL's do that are not asynchronous: there is nothing to wait for."""
    log: list[Noted] = []
    call = collectives._noting(log, "all_reduce", lambda *_, **__: None, torch.device("cpu"))
    assert call([torch.ones(3), torch.ones(2)], None, timeout=1) is None
    assert [(one.kind, one.bytes) for one in log] == [("all_reduce", 4 * 5)] and log[0].left >= log[0].arrived


def test_outside_of_collectives_a_gpu_is_computing_all_the_time() -> None:
    """And nothing is said to have been without a processor, whatever the thread did that drives it."""
    log, taken = [Noted("all_reduce", 4, 1.0, 4.0, 0.1), Noted("broadcast", 4, 5.0, 5.5, 0.1)], _Taken(10.0, 2.0)
    found = {name: _on_a_core(taken, log, torch.device(name)) for name in ("cpu", "cuda")}
    assert found == pytest.approx({"cpu": 1.8, "cuda": 6.5})
    parts = scaling._parts(0, [Done([], [log], [taken.seconds], [found["cuda"]])])
    assert parts["computing"] == pytest.approx(6.5) and parts["without a processor"] == pytest.approx(0.0)


def test_ranks_beyond_the_processors_share_them() -> None:
    calls, links = [Call("all_reduce", 8e6, 2)], {"all_reduce": Link(0.001, 1e9)}
    communicating = 2 * 0.001 + 2 * 2 * 8e6 * 3 / 4 / 1e9
    assert predict_here(0.5, calls, 4, 2, links) == pytest.approx(1.0 + communicating)
    assert predict_here(0.5, calls, 4, 8, links) == pytest.approx(0.5 + communicating)


def test_times_on_a_busy_machine_are_said_to_be_no_good() -> None:
    def told(without: float, kind: str = "cpu") -> str:
        alone = {"world": 1, "parts": {"whole": 1.0, "without a processor": without}}
        return caveats({"kind": kind, "machine": {"processors": 2}, "worlds": [alone, {"world": 4}]})

    assert "not to be relied on" in told(0.5) and "With 4 ranks there are more" in told(0.5)
    assert "relied" not in told(0.01) and told(0.5, "h100") == ""


def test_a_rank_that_fails_or_hangs_is_reported() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with pytest.raises(RuntimeError, match="rank 3 had no answer within 0 seconds"):
        scaling._received(ours, 3, 0)
    theirs.send(Report([], {}, 0.0, {}, "ValueError: no room"))
    with pytest.raises(RuntimeError, match="rank 1: ValueError: no room"):
        scaling._received(ours, 1, 5)
    theirs.close()
    with pytest.raises(RuntimeError, match="rank 0 ended without an answer"):
        scaling._received(ours, 0, 5)


def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "configs" / "demo.yaml")
    assert scaling.run(options("--config", config, "--json", str(tmp_path / "missing"))) == 2
    assert "--json: given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.crop_size=60", "method.critic_width=0"], "critic_width"),
        (["method.name=bicyclegan", "train.global_batch=3"], "multiple of 2"),
        (
            ["method={name: ugatit, light: true, width: 4, critic_width: 4}", "data.crop_size=64"],
            "crop_size: given 64, which does not fit",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    settings: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: {name: dclgan}\ndata: {root: nowhere, load_size: 64, crop_size: 64}\n")
    chosen = [word for setting in settings for word in ("--set", setting)]
    assert scaling.run(options("--config", str(path), *chosen)) == 2
    assert words in capsys.readouterr().err


def test_the_page_is_what_the_generator_makes() -> None:
    text = scaling_page.generate(DOCS / "scaling")
    assert (DOCS / "scaling.md").read_text() == text, "run `python launchers/bench.py scaling-page`"
    for device in ("NVIDIA H100", "NVIDIA H200"):
        assert f"### {device}\n\nNot measured yet." in text
    assert text.count("MODEL, not measured") >= 5 and "{{" not in text
