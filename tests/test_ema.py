"""The averaged generators: the average of what the weights were, saved and loaded into a replica."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2i_dist.ema import Ema
from i2i_dist.engines import Layout
from i2i_dist.schedules import ema_decay


def side_of(module: nn.Module) -> Any:
    """A side as an engine at ZeRO stage 0 on one rank holds it; what sharding changes is tested with engines."""
    engine = SimpleNamespace(optimizer=None)
    return SimpleNamespace(
        module=module, optimizer=torch.optim.SGD(module.parameters()), engine=engine, layout=ONE_RANK,
        device=torch.device("cpu"),
    )  # fmt: skip


ONE_RANK = Layout(1, 1, 1)


def networks(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2))


class Stored:
    """A checkpoint in memory."""

    scalars: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in self.tensors.items()}

    def read(self, key: str, start: int, length: int) -> Tensor:
        return self.tensors[key].flatten()[start : start + length]


def loaded(ema: Ema) -> dict[str, Tensor]:
    replica = networks(seed=99)
    ema.load_into(replica)
    return {name: p.detach() for name, p in replica.named_parameters()}


def test_it_is_the_weighted_mean_of_what_the_weights_were() -> None:
    module = networks()
    ema = Ema(side_of(module), half_life_images=8)
    expected = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    for step in range(1, 21):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape))
        ema.update(images_seen=4 * step, batch=4)
        decay = ema_decay(4 * step, 4, 8)
        for name, p in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in loaded(ema).items():
        assert torch.allclose(value.double(), expected[name], rtol=0, atol=1e-5)
        assert float((value - dict(module.named_parameters())[name]).detach().abs().max()) > 1e-2


def test_it_starts_at_the_weights_and_is_a_copy() -> None:
    module = networks()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema = Ema(side_of(module), half_life_images=8)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert all(torch.equal(value, start[name]) for name, value in loaded(ema).items())


def test_the_first_update_forgets_the_initialisation() -> None:
    module = networks()
    ema = Ema(side_of(module), half_life_images=10_000)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    ema.update(images_seen=1, batch=1)  # a twentieth of an image is twenty half-lives
    assert all(torch.allclose(value, torch.tensor(7.0), atol=1e-4) for value in loaded(ema).values())


def test_switched_off_it_is_the_weights() -> None:
    module = networks()
    ema = Ema(side_of(module), half_life_images=0)
    assert ema.averages == {}
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(3.0)
    ema.update(images_seen=4, batch=4)
    ema.restore(Stored({}))
    assert all(bool((value == 3.0).all()) for value in loaded(ema).values())


@pytest.mark.parametrize("has_average", [True, False])
def test_restored_from_the_average_or_else_the_weights(has_average: bool) -> None:
    module = networks()
    ema = Ema(side_of(module), half_life_images=8)
    other, third = networks(1), networks(2)
    tensors = {f"param/{name}": p.detach() for name, p in other.named_parameters()}
    if has_average:
        tensors |= {f"ema/{name}": p.detach() for name, p in third.named_parameters()}
    ema.restore(Stored(tensors))
    expected = dict((third if has_average else other).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in loaded(ema).items())


def test_ranks_without_a_replica_take_part() -> None:
    module = networks()
    before = [p.detach().clone() for p in module.parameters()]
    Ema(side_of(module), half_life_images=8).load_into(None)
    assert all(torch.equal(p, was) for p, was in zip(module.parameters(), before, strict=True))
