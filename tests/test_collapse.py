"""Each kind of collapse is told, through real updates and the reporter, and training that goes well is not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2i_dist.collapse import WARM_UP
from i2i_dist.data.batch import Batch
from i2i_dist.pool import ImagePools
from i2i_dist.step import update
from tests.methods.plain_side import plain_sides
from tests.test_reporter import reporter
from tests.updates import small_method

SPREADS = ["fake_a_spread", "fake_b_spread"]
CHANGES = ["fake_a_change", "fake_b_change"]


def pictures(number: int) -> tuple[Tensor, Tensor]:
    """Return pictures [1, 3, 32, 32] of two domains: bright blobs, and dark ones, at places of their own."""
    draw = torch.Generator().manual_seed(number)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    found = []
    for sign in (1.0, -1.0):
        at, colour = torch.rand(2, generator=draw) * 1.6 - 0.8, torch.rand(3, 1, 1, generator=draw)
        blob = torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 0.2)
        found.append(sign * (2 * blob * colour - 0.7)[None])
    return found[0], found[1]


def train(
    method: Any, directory: Path, numbers: range, every: int, factor: float = 1.0
) -> tuple[list[dict[str, Any]], Any]:
    """Train alone, with a record every so many updates; return the rows of stats.jsonl, and the metrics."""
    one, sides = reporter(method, directory, world=1), plain_sides(method, factor)
    for number in numbers:
        batch = Batch(*pictures(number), torch.tensor([number]), number)
        one.begin()
        step = update(method, sides, [batch], ImagePools((), 0, 0), seed=0, number=number, images_seen=number)
        one.note(step, number, number + 1, batch)
        one.meter.end(number + 1)
        if (number + 1) % every == 0:
            one.write()
    assert one.metrics is not None
    return [json.loads(line) for line in (directory / "stats.jsonl").read_text().splitlines()], one.metrics.registry


class Around(nn.Module):
    """A network whose outputs are changed."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, pictures: Tensor) -> Any:
        made = self.inner(pictures)
        return (self.change(pictures, made[0]), made[1]) if isinstance(made, tuple) else self.change(pictures, made)


def generators(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    def apply(method: Any) -> None:
        side = method.generator
        side.generator_ab, side.generator_ba = Around(side.generator_ab, change), Around(side.generator_ba, change)

    return apply


def critics(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    def apply(method: Any) -> None:
        side = method.discriminator
        side.critic_a, side.critic_b = Around(side.critic_a, change), Around(side.critic_b, change)

    return apply


def told_apart(pictures: Tensor, verdicts: Tensor) -> Tensor:
    """Be right, and go on being so: real pictures, in front of the fakes, are seen in the critics' own turn alone."""
    real = torch.zeros_like(verdicts)
    real[: len(verdicts) // 2] = 1.0
    return real + 0.001 * verdicts if len(verdicts) > 1 else 5.0 * verdicts


KINDS = {
    "one output for all inputs": (generators(lambda x, made: 0.01 * made + 0.3), SPREADS),
    "the input itself": (generators(lambda x, made: x + 0.001 * made), CHANGES),
    "the input, mirrored": (generators(lambda x, made: x.flip(-1) + 0.001 * made), CHANGES),
    "critics that tell all apart": (critics(told_apart), ["critic_doubt"]),
    "critics that are flat": (critics(lambda x, verdicts: 0.5 + 1e-5 * verdicts), ["critic_pull"]),
    "nothing of it": (lambda method: None, []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_collapse_is_warned_of_once_after_the_warm_up(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apply, low = KINDS[kind]
    method = small_method("cyclegan")
    apply(method)
    with caplog.at_level(logging.INFO, logger="i2i_dist"):
        rows, registry = train(method, tmp_path, range(WARM_UP - 4, WARM_UP + 8), every=4, factor=0.0 if low else 1.0)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split(" is ")[0] for text in warned] == sorted(low)
    lines = [record.getMessage() for record in caplog.records if "img " in record.getMessage()]
    assert len(lines) == len(rows) == 3
    for name in low:
        assert rows[0]["gauges"][name] < 0.05 and name not in lines[0], "it was warned of before the warm-up's end"
        assert f" {name} " in lines[1] and f" {name} " in lines[2]
        found = registry.get_sample_value("i2i_train_gauge", {"name": name})
        assert found == rows[-1]["gauges"][name]
