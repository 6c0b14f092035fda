"""What is computed of a side's memory is what two ranks hold, at every ZeRO stage."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2i_dist import memory
from i2i_dist.config import ConfigError
from i2i_dist.distributed import rank_and_world
from i2i_dist.doctor import main, memory_report
from i2i_dist.ema import Ema
from i2i_dist.engines import Layout, SideEngine, bucket_elements
from i2i_dist.memory import side_memory
from i2i_dist.method import ParameterGroup
from tests.ranks import ROOT, run_ranks

WORLD, STAGES = 2, range(4)
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


def measure() -> dict[int, int]:
    """Run on every rank: what a side holds at the end of its second backward pass."""
    found = {}
    for stage in STAGES:
        before = held()
        module = Net()
        side = SideEngine(module, groups(module), Layout(1, 1, WORLD, stage=stage), torch.device("cpu"))
        average = Ema(side, 10)
        x = torch.ones(1, 1000)
        for update in range(2):
            side.backward(side(x), last=True)
            if update == 1:
                found[stage] = held() - before - 4 * 1000
            side.step(skip=False)
        del module, side, average, x
    assert rank_and_world()[1] == WORLD
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, int]]:
    return run_ranks(WORLD, "tests.test_memory:measure", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_what_the_rank_holds_that_holds_most(measured: list[dict[int, int]], stage: int) -> None:
    module = Net()
    computed = side_memory(module, groups(module), stage, WORLD, averaged=True)
    transient = computed.passing + (computed.bucket if stage in (1, 2) else 0)  # gone at the end of the pass
    assert max(rank[stage] for rank in measured) == pytest.approx(computed.whole - transient, rel=0.01)


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
        assert row[0] == "0" or float(row[8]) + float(row[9]) == pytest.approx(whole, abs=0.02)
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
