"""What is computed of a side's memory is what two ranks hold, at every ZeRO stage."""

from __future__ import annotations

import contextlib
import gc
import time
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from i2i_dist import engines, memory
from i2i_dist.config import ConfigError
from i2i_dist.distributed import rank_and_world
from i2i_dist.doctor import main, memory_report
from i2i_dist.ema import Ema
from i2i_dist.engines import Layout, SideEngine, bucket_elements
from i2i_dist.memory import offloaded_memory, side_memory
from i2i_dist.method import ParameterGroup
from tests.ranks import ROOT, run_ranks

WORLD, STAGES = 2, range(4)
BUCKETS = (50_000_000, 100_000)  # one that takes the whole side, and one that is smaller than its matrices
CONFIG = ROOT / "configs" / "dclgan_horse2zebra.yaml"


class Net(nn.Module):
    """Matrices of which the border between two shares cuts one, with small vectors beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1000, 700), nn.Linear(700, 900)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.second(self.first(x).relu()).sum()
        return total


def groups(module: Net) -> list[ParameterGroup]:
    return [
        ParameterGroup("first", list(module.first.parameters()), 1e-3, (0.5, 0.9)),
        ParameterGroup("second", list(module.second.parameters()), 1e-3, (0.5, 0.9)),
    ]


def held() -> int:
    """Return the bytes of all storages that a tensor is alive on."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        with contextlib.suppress(ReferenceError, RuntimeError):  # of objects that are about to go
            if isinstance(found, Tensor):
                for tensor in (found, found.grad):
                    if tensor is not None:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    storages.pop(0, None)
    return sum(storages.values())


def settled() -> int:
    """Return the least of three readings: gloo's threads hold a buffer for a moment after the ranks have met."""
    readings = [held()]
    for _ in range(2):
        time.sleep(0.1)
        readings.append(held())
    return min(readings)


class Weighed(NamedTuple):
    """What a side holds in its second update, in bytes: when the backward pass ends, and at the most while it steps."""

    end: int
    step: int


def weigh(stage: int, offload: bool = False) -> Weighed:
    before = settled()
    module = Net()
    side = SideEngine(module, groups(module), Layout(1, 1, WORLD, stage, offload=offload), torch.device("cpu"))
    average = Ema(side, 10)
    x = torch.ones(1, 1000)
    stepping: list[int] = []
    step = side.optimizer.step

    def weighed(*arguments: Any) -> Any:
        stepping.append(settled() - before - 4 * 1000)
        return step(*arguments)

    side.backward(side(x), last=True)
    side.step(skip=False)
    side.backward(side(x), last=True)
    end = settled() - before - 4 * 1000
    side.optimizer.step = weighed
    side.step(skip=False)
    del side.optimizer.step  # the optimizer's own again, and nothing keeps the side alive
    assert average.averages
    return Weighed(end, max(stepping))


def measure() -> dict[Any, Weighed]:
    """Run on every rank: all stages, with buckets of two sizes, and with the optimizer's state offloaded.

    Here everything lies in CPU memory, so that of the offloaded only the sum is seen.
    """
    found: dict[Any, Weighed] = {}
    for bucket in BUCKETS:
        engines.LARGEST_BUCKET = bucket
        for stage in STAGES:
            found[bucket, stage] = weigh(stage)
    for stage in (1, 2, 3):
        found["offloaded", stage] = weigh(stage, offload=True)
    assert rank_and_world()[1] == WORLD
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Weighed]]:
    return run_ranks(WORLD, "tests.test_memory:measure", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("stage", STAGES)
def test_it_is_what_the_rank_holds_that_holds_most(
    measured: list[dict[Any, Weighed]], monkeypatch: pytest.MonkeyPatch, stage: int, bucket: int
) -> None:
    monkeypatch.setattr(engines, "LARGEST_BUCKET", bucket)
    module = Net()
    computed = side_memory(module, groups(module), stage, WORLD, averaged=True)
    transient = computed.passing + (computed.bucket if stage in (1, 2) else 0)  # gone at the end of the pass
    lasting = computed.whole - transient
    assert max(rank[bucket, stage].end for rank in measured) == pytest.approx(lasting, rel=0.01)
    copied = 4 * 700 * 1001 // WORLD if stage else 0  # of the larger group
    assert max(rank[bucket, stage].step for rank in measured) == pytest.approx(lasting + copied, rel=0.01)
    assert copied <= transient


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_both_memories_hold_what_is_computed(
    measured: list[dict[Any, Weighed]], stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LARGEST_BUCKET", BUCKETS[-1])
    module = Net()
    computed = offloaded_memory(module, groups(module), stage, WORLD, averaged=True)
    bucket = 4 * bucket_elements(module)
    transient = bucket if stage < 3 else 2 * 4 * 700 * 1000
    for moment in ("end", "step"):
        found = max(getattr(rank["offloaded", stage], moment) for rank in measured)
        assert found == pytest.approx(sum(computed) - transient, rel=0.01)
    kept = side_memory(module, groups(module), stage, WORLD, averaged=True)
    assert computed.host >= kept.optimizer + kept.averages
    assert computed.device <= kept.whole - kept.optimizer - kept.averages


def test_a_share_within_one_parameter_is_not_copied() -> None:
    module = nn.Linear(1000, 2000, bias=False)
    assert bucket_elements(module) == 2_000_000
    group = [ParameterGroup("all", list(module.parameters()), 1e-3, (0.5, 0.9))]
    for world in (1, 2):
        found = side_memory(module, group, 2, world, averaged=False)
        assert (found.gradients, found.passing) == (4 * 2_000_000, 0)
    assert memory._touched([10, 6], 0, 2) == (10, 0)  # 8 of the first one's 10
    assert memory._touched([10, 6], 1, 2) == (16, 8)
    assert memory._touched([7], 1, 2) == (7, 4)  # padded to 4, and padding is a copy


def test_more_ranks_take_less_each_where_something_is_shared() -> None:
    module = Net()
    for stage in STAGES:
        few, many = (side_memory(module, groups(module), stage, world, averaged=False) for world in (2, 64))
        assert (many.whole < few.whole) == (stage > 0)
        assert many.passing == few.passing and many.bucket == few.bucket
    assert side_memory(module, groups(module), 3, 1, averaged=True).averages == 4 * sum(
        p.numel() for p in module.parameters()
    )


def test_the_bucket_is_never_larger_than_the_side() -> None:
    module = nn.Linear(100, 100)
    assert bucket_elements(module) == 10_100
    with torch.device("meta"):
        assert bucket_elements(nn.Linear(100_000, 100_000)) == 50_000_000


def test_the_report_adds_up_and_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = set()

    def noted(module: nn.Module, *rest: Any) -> memory.SideMemory:
        devices.update(parameter.device.type for parameter in module.parameters())
        return side_memory(module, *rest)

    monkeypatch.setattr("i2i_dist.doctor.side_memory", noted)
    lines = memory_report(CONFIG, ["method.width=640"], ranks=4)
    assert devices == {"meta"}
    assert any("generator_ab 1,135," in line and "parameters in all" in line for line in lines)
    rows = [line.split() for line in lines if line[:1] in set("0123")]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"] * 2
    for row in rows:
        parts, whole = [float(cell) for cell in row[1:7]], float(row[7])
        assert sum(parts) == pytest.approx(whole, abs=0.04)
        assert row[0] == "0" or float(row[8]) < whole < float(row[8]) + float(row[9])
    assert float(lines[-1].split()[-2]) >= float(rows[0][1]) and "Rank 0 also has" in lines[-1]
    # 2.27 G parameters in two generators: 8.46 GiB each of parameters and gradients, and twice that of moments.
    assert [float(cell) for cell in rows[0][1:4]] == pytest.approx([8.46, 8.46, 16.93], rel=0.02)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", str(CONFIG), "--ranks", "0"], "--ranks: given 0, allowed is 1 or more"),
        (["--config", "nowhere.yaml"], "there is no configuration nowhere.yaml"),
        (["--config", str(CONFIG), "--set", "method.widht=3"], "did you mean 'width'?"),
        (["--set", "method.width=3"], "name one with --config FILE"),
        (["--ranks", "8"], "name one with --config FILE"),
    ],
)
def test_what_cannot_be_computed_is_told_in_a_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_usable_configuration_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(CONFIG), "--ranks", "8"]) in (0, 1)  # as the ops of this machine are
    assert "Memory on each of 8 ranks" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="allowed is 1 or more"):
        memory_report(CONFIG, [], -1)


def test_a_stage_that_is_refused_is_not_reckoned() -> None:
    lines = memory_report(CONFIG.with_name("matchgan_celeba.yaml"), [], ranks=2)
    starts = [line.split(maxsplit=1) for line in lines if line[:1] in set("0123")]
    assert [number for number, _ in starts] == ["0", "1", "2", "3"] * 2
    assert starts[-1][1].startswith("is refused: engine.discriminator_stage: given 3, ")
    assert "is refused" not in starts[3][1]
