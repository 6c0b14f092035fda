"""Updates in which the sides' turns are not one each."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from i2i_dist.data.batch import Batch
from i2i_dist.method import ParameterGroup
from i2i_dist.pool import ImagePools
from i2i_dist.step import Step, update
from tests.methods.plain_side import PlainSide


class Outputs(NamedTuple):
    fake: Tensor
    noted: Tensor
    rest: Tensor | None = None


class Scale(nn.Module):
    """A side of one number; as a generator it notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.5]))
        self.calls: list[tuple[bool, bool]] = []  # fakes_only, with a graph

    def forward(self, batch: Batch, draws: Any, fakes_only: bool = False) -> Outputs:
        self.calls.append((fakes_only, torch.is_grad_enabled()))
        return Outputs(batch.a * self.factor, batch.a + 1.0, None if fakes_only else batch.b)


class Game:
    """A method whose generator trains in every third update."""

    fakes, shown = ("fake",), ("noted",)

    def __init__(self) -> None:
        self.generator, self.discriminator = Scale(), Scale()
        self.seen: list[Outputs] = []

    def turns(self, number: int) -> tuple[str, ...]:
        return ("discriminator", "generator") if number % 3 == 2 else ("discriminator",)

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Any, images_seen: int) -> dict[str, Tensor]:
        return {"gan": outputs.fake.mean()}

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Any, images_seen: int) -> dict[str, Tensor]:
        self.seen.append(outputs)
        return {"critic": (self.discriminator.factor * outputs.fake).mean()}


def play(game: Any, number: int, parts: int, pools: ImagePools | None = None) -> tuple[Step, dict[Any, Any]]:
    groups = {
        side: [ParameterGroup(side, list(getattr(game, side).parameters()), 0.1, (0.5, 0.9))]
        for side in ("generator", "discriminator")
    }
    sides: Any = {side: PlainSide(getattr(game, side), group) for side, group in groups.items()}
    pictures = torch.arange(12, dtype=torch.float32).reshape(4, 3, 1, 1)
    batches = [Batch(part, -part, torch.arange(len(part)), 0) for part in pictures.chunk(parts)]
    pools = pools or ImagePools((), 0, 0)
    return update(game, sides, batches, pools, seed=0, number=number, images_seen=0), sides


@pytest.mark.parametrize("parts", [1, 2])
def test_without_the_generators_turn_its_fakes_are_made_without_a_graph_and_it_stays_as_it_is(parts: int) -> None:
    game = Game()
    step, sides = play(game, 0, parts)
    assert step.losses.keys() == {"critic"} and step.skipped == ()
    assert (sides["generator"].steps, sides["discriminator"].steps) == (0, 1)
    assert game.generator.calls == [(True, False)] * parts
    assert float(game.generator.factor.detach()) == 0.5 and game.generator.factor.grad is None


def test_with_it_one_pass_serves_both_turns() -> None:
    game = Game()
    step, sides = play(game, 2, 1)
    assert step.losses.keys() == {"critic", "gan"}
    assert (sides["generator"].steps, sides["discriminator"].steps) == (1, 1)
    assert game.generator.calls == [(False, True)]
    assert float(game.generator.factor.detach()) != 0.5


def test_only_the_critics_step_is_dropped_where_there_is_no_other() -> None:
    game = Game()
    groups = ParameterGroup("all", list(game.discriminator.parameters()), 0.1, (0.5, 0.9))
    bad: Any = PlainSide(game.discriminator, [groups])
    bad._watch.take = lambda: torch.ones(())
    bad.step = lambda *, skip: seen.append(skip)
    seen: list[bool] = []
    generator = PlainSide(game.generator, [groups._replace(parameters=list(game.generator.parameters()))])
    batch = Batch(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.arange(1), 0)
    sides: Any = {"generator": generator, "discriminator": bad}
    for number, dropped in ((0, ("discriminator",)), (2, ("generator", "discriminator"))):
        step = update(game, sides, [batch], ImagePools((), 0, 0), seed=0, number=number, images_seen=0)  # type: ignore[arg-type]
        assert step.skipped == dropped and step.met == ("discriminator",)
    assert seen == [True, True] and generator.steps == 0


def test_what_is_shown_beside_the_fakes_does_not_go_through_the_pool() -> None:
    """The pool is full of older fakes, and the critics see some of them; the rest is of this very batch."""
    game, pools = Game(), ImagePools(("fake",), 2, 0)
    pools.images["fake"] = [torch.full((3, 1, 1), 100.0)] * 2
    play(game, 0, 1, pools)
    (outputs,) = game.seen
    fresh = torch.arange(12, dtype=torch.float32).reshape(4, 3, 1, 1)
    assert torch.equal(outputs.noted, fresh + 1.0) and outputs.rest is None
    assert (outputs.fake == 100.0).any()
    assert not outputs.fake.requires_grad and not outputs.noted.requires_grad
