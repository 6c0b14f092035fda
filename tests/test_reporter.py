"""What a method watches reaches the log, the metrics and the console, and is told once when it falls too low."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist import reporter as reporter_module
from i2i_dist.collapse import Listener
from i2i_dist.data.batch import Batch
from i2i_dist.method import Gauge
from i2i_dist.pace import moment
from i2i_dist.reporter import Reporter
from i2i_dist.step import Step

NO_BATCH = Batch(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0)
VALUES = [0.5, 0.04, 0.03, 0.06, 0.05, 0.01]


class Watched:
    """Of a method, what the reporter asks for."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def gauges(self) -> Mapping[str, Gauge]:
        return {"spread": Gauge(self.value, 0.05, "it is stuck; free it")}


def reporter(method: Any, directory: Path, rank: int = 0, world: int = 2, **output: Any) -> Reporter:
    output = {"metrics_port": None, "checkpoint_every_images": 10} | output
    run = SimpleNamespace(
        method=method, target=100, device=torch.device("cpu"), layout=SimpleNamespace(precision="fp32"),
        ranks=SimpleNamespace(rank=rank, world=world),
        start=SimpleNamespace(images_seen=0, updates=0, dataset={"a": {}, "b": {}}, config={"method": {"name": "x"}}),
        settings=SimpleNamespace(
            directory=directory, config=SimpleNamespace(output=SimpleNamespace(**output)),
        ),
    )  # fmt: skip
    return Reporter(run)  # type: ignore[arg-type]


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Two ranks, of which the other has seen twice as much of everything but of broken samples."""
    calls: list[Tensor] = []

    def mean(values: Tensor) -> Tensor:
        calls.append(values)
        return values * 1.5

    monkeypatch.setattr(reporter_module, "mean_over_ranks", mean)
    return calls


def run_through(one: Reporter, method: Any) -> None:
    for number, value in enumerate(VALUES, start=1):
        if isinstance(method, Watched):
            method.value.fill_(value / 1.5)
        one.begin()
        losses = {"gan": torch.tensor(float(number)), "cycle": torch.tensor(2.0)}
        one.note(Step(losses, (), (), Listener(()), moment(torch.device("cpu"))), number - 1, number, NO_BATCH)
        one.meter.end(number)
        one.write()


def test_a_gauge_is_told_each_time_it_falls_below_its_lowest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reduced: list[Tensor]
) -> None:
    method = Watched()
    one = reporter(method, tmp_path)
    with caplog.at_level(logging.INFO, logger="i2i_dist"):
        run_through(one, method)
    assert len(reduced) == len(VALUES), "more than one collective at a log point"
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["gauges"]["spread"] for row in rows] == pytest.approx(VALUES)
    assert [row["losses"] for row in rows] == [{"cycle": 3.0, "gan": 1.5 * number} for number in range(1, 7)]
    assert one.metrics is not None
    found = one.metrics.registry.get_sample_value("i2i_train_gauge", {"name": "spread"})
    assert found == pytest.approx(VALUES[-1])
    lines = [record for record in caplog.records if "update" in record.getMessage()]
    assert "cycle 3 gan 1.5 |" in lines[0].getMessage()  # a gauge is shown while it is low
    assert "cycle 3 gan 3 spread 0.04 |" in lines[1].getMessage()
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"spread is {value}, below 0.05: it is stuck; free it." for value in ("0.04", "0.01")]


def test_metrics_are_served_on_the_address_that_is_asked_for(tmp_path: Path) -> None:
    one = reporter(object(), tmp_path, metrics_port=0, metrics_host="127.0.0.2")
    assert one._server is not None
    with urllib.request.urlopen(f"http://127.0.0.2:{one._server.port}/metrics", timeout=10) as answer:
        assert b"i2i_train_images_seen" in answer.read()
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{one._server.port}/metrics", timeout=10)
    one.close()


def test_other_ranks_and_other_methods_say_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reduced: list[Tensor]
) -> None:
    for method, rank in ((Watched(), 1), (object(), 0)):
        run_through(reporter(method, tmp_path, rank), method)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["gauges"] for row in rows] == [{}] * len(VALUES)
