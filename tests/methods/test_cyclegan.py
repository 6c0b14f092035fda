"""CycleGAN: shared passes give what a second reading gives in separate ones; critics see what the pool returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.method import SIDES
from i2i_dist.methods import resolve
from i2i_dist.methods.cyclegan import Outputs
from i2i_dist.step import update
from tests.methods import plain_networks as plain
from tests.methods.plain_networks import SIZE, assert_same, batch, gradients
from tests.methods.plain_side import plain_sides

SMALL = {"width": 4, "blocks": 2, "critic_width": 4}
DRAWS = Draws(seed=3, update_position=64)


def build(**changes: Any) -> Any:
    return plain.build({"name": "cyclegan", **SMALL, **changes}, scale=5.0)


def separate(method: Any, given: Batch) -> Outputs:
    """Six passes, each on its own."""

    def ab(image: Tensor) -> Tensor:
        return plain.strided_image(method.generator.generator_ab, image)

    def ba(image: Tensor) -> Tensor:
        return plain.strided_image(method.generator.generator_ba, image)

    fake_b, fake_a = ab(given.a), ba(given.b)
    return Outputs(fake_a, fake_b, ba(fake_b), ab(fake_a), ba(given.a), ab(given.b))


def official_generator_terms(method: Any, given: Batch, outputs: Outputs) -> dict[str, Tensor]:
    d, one = method.discriminator, torch.ones((), dtype=torch.float64)
    judged_b, judged_a = (
        plain.strided_logits(d.critic_b, outputs.fake_b),
        plain.strided_logits(d.critic_a, outputs.fake_a),
    )
    return {
        "gan_ab": F.mse_loss(judged_b, one.expand_as(judged_b)),
        "gan_ba": F.mse_loss(judged_a, one.expand_as(judged_a)),
        "cycle_a": 10 * F.l1_loss(outputs.cycled_a, given.a),
        "cycle_b": 10 * F.l1_loss(outputs.cycled_b, given.b),
        "identity_a": 5 * F.l1_loss(outputs.identity_a, given.a),
        "identity_b": 5 * F.l1_loss(outputs.identity_b, given.b),
    }


def official_critic_terms(method: Any, given: Batch, fake_a: Tensor, fake_b: Tensor) -> dict[str, Tensor]:
    d = method.discriminator
    return {
        name: 0.5
        * (
            (plain.strided_logits(critic, real) - 1).square().mean()
            + plain.strided_logits(critic, fake).square().mean()
        )
        for name, critic, real, fake in (
            ("critic_a", d.critic_a, given.a, fake_a),
            ("critic_b", d.critic_b, given.b, fake_b),
        )
    }


@pytest.mark.parametrize("images", [1, 2])
def test_shared_passes_give_what_separate_ones_give(images: int) -> None:
    method, given = build(), batch(images)
    ours, theirs = method.generator(given, DRAWS), separate(method, given)
    assert_same(ours._asdict(), theirs._asdict(), 1e-12)
    terms = method.generator_loss(given, ours, method.discriminator, 0)
    official = official_generator_terms(method, given, theirs)
    assert_same(terms, official)
    assert all(term.item() > 1e-2 for term in terms.values()), "a term that is 0 compares with anything"
    mine, theirs = gradients(method.generator, terms), gradients(method.generator, official)
    assert_same(mine, theirs)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert sum(float(value.abs().max()) > 1e-6 for value in mine.values()) > len(mine) // 2


def test_critics_see_both_in_one_pass() -> None:
    method, given = build(), batch(2)
    fakes = method.generator(given, DRAWS, True)
    shown = Outputs(fakes.fake_a.detach(), fakes.fake_b.detach())
    official = official_critic_terms(method, given, *shown[:2])
    terms = method.discriminator_loss(given, shown, method.discriminator, 0)
    assert_same(terms, official)
    assert_same(gradients(method.discriminator, terms), gradients(method.discriminator, official))


def test_fakes_alone_are_the_same_fakes() -> None:
    method, given = build(), batch(2)
    alone, full = method.generator(given, DRAWS, True), method.generator(given, DRAWS)
    assert_same({"a": alone.fake_a, "b": alone.fake_b}, {"a": full.fake_a, "b": full.fake_b}, 1e-12)
    assert alone[2:] == (None,) * 4


def test_weights_stand_at_their_terms() -> None:
    given, one = batch(1), build()
    changed = build(lambda_gan=3.0, lambda_cycle_a=2.0, lambda_cycle_b=7.0, lambda_identity=0.25)
    terms = one.generator_loss(given, one.generator(given, DRAWS), one.discriminator, 0)
    weighted = changed.generator_loss(given, changed.generator(given, DRAWS), changed.discriminator, 0)
    factors = {
        "gan_ab": 3.0, "gan_ba": 3.0, "cycle_a": 0.2, "cycle_b": 0.7, "identity_a": 0.5 / 5, "identity_b": 1.75 / 5,
    }  # fmt: skip
    assert_same(weighted, {name: factors[name] * term for name, term in terms.items()})


def test_without_identity_its_passes_are_not_made() -> None:
    method, given, images = build(preset="paper"), batch(1), []
    for name in ("generator_ab", "generator_ba"):
        getattr(method.generator, name).register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    outputs = method.generator(given, DRAWS)
    assert outputs.identity_a is outputs.identity_b is None
    assert sum(images) == 4
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert set(terms) == {"gan_ab", "gan_ba", "cycle_a", "cycle_b"}
    theirs = separate(method, given)
    official = official_generator_terms(method, given, theirs)
    assert_same(terms, {name: official[name] for name in terms})


class OtherImages:
    """A pool that returns images of its own, and notes what it was given."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(9)
        self.a, self.b = (torch.rand(2, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) for _ in range(2))
        self.given: list[tuple[Outputs, list[int]]] = []

    def exchange(self, outputs: Outputs, positions: Tensor) -> Outputs:
        self.given.append((outputs, positions.tolist()))
        return outputs._replace(fake_a=self.a, fake_b=self.b)


@pytest.mark.parametrize("name", ["cyclegan", "dclgan"])
def test_critics_are_shown_what_the_pool_returns(name: str) -> None:
    """In the discriminator's turn alone, whichever turn comes first; the generator is judged by its own fakes."""
    method_class, config = resolve({"name": name, **SMALL} | ({"nce_layers": ["down1"]} if name == "dclgan" else {}))
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    for side in SIDES:
        getattr(method, side).double()
    given, pool = batch(2), OtherImages()
    sides = plain_sides(method, 0.0)
    fakes = method.generator(given, DRAWS, True)
    step = update(method, sides, [given], pool, seed=3, number=0, images_seen=0)  # type: ignore[arg-type]
    assert all(side.steps == 1 for side in sides.values())
    assert step.skipped == ()
    ((handed, positions),) = pool.given
    assert positions == [64, 65]
    assert torch.allclose(handed.fake_a, fakes.fake_a, atol=1e-12)
    assert torch.allclose(handed.fake_b, fakes.fake_b, atol=1e-12)
    assert not handed.fake_a.requires_grad
    shown = type(handed)(fake_a=pool.a, fake_b=pool.b)
    critics = method.discriminator_loss(given, shown, method.discriminator, 0)
    generators = method.generator_loss(given, method.generator(given, Draws(3, 64)), method.discriminator, 0)
    assert_same(step.losses, {**critics, **generators})


def test_presets() -> None:
    official, paper = (resolve({"name": "cyclegan", "preset": preset})[1] for preset in ("official", "paper"))
    assert official.model_dump() == {
        "name": "cyclegan", "preset": "official", "width": 64, "blocks": 9, "critic_width": 64, "adversarial": "lsgan",
        "lambda_gan": 1.0, "lambda_cycle_a": 10.0, "lambda_cycle_b": 10.0, "lambda_identity": 0.5, "pool_size": 50,
        "lr": 2e-4, "betas": (0.5, 0.999),
    }  # fmt: skip
    assert paper.model_dump() == official.model_dump() | {"preset": "paper", "lambda_identity": 0.0}


def test_the_whole_method_has_as_many_parameters_as_the_authors_code() -> None:
    method_class, config = resolve({"name": "cyclegan"})
    with torch.device("meta"):
        method = method_class(config, torch.Generator("cpu"))
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == 28_285_832


def test_all_parameters_have_the_rate_of_the_configuration() -> None:
    groups = build(lr=3e-4, betas=[0.4, 0.9]).parameter_groups()
    assert all((group.lr, group.betas) == (3e-4, (0.4, 0.9)) for side in SIDES for group in groups[side])


def test_the_generators_have_the_first_turn() -> None:
    expected = "generator", "discriminator"
    assert all(build().turns(number) == expected for number in (0, 1, 17))


@pytest.mark.parametrize("size", [(24, 40), (32, 32)])
def test_translate_both_ways(size: tuple[int, int]) -> None:
    method = build()
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    there, back = method.translate(image, "a_to_b"), method.translate(image, "b_to_a")
    assert there.shape == back.shape == image.shape
    assert float(there.detach().abs().max()) <= 1
    assert torch.equal(there, method.generator.generator_ab(image)[0])
    assert torch.equal(back, method.generator.generator_ba(image)[0])
    assert not torch.allclose(there, back)


def test_the_pool_has_the_size_of_the_configuration() -> None:
    assert build().pool_size == 50
    assert build(pool_size=0).pool_size == 0
    assert build().fakes == ("fake_a", "fake_b")
