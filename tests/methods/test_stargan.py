"""StarGAN: losses and gradients against torch.nn.functional, whose turn it is, targets, sizes, rates, presets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist import config as configuration
from i2i_dist.config import ConfigError
from i2i_dist.method import SIDES, Labelled
from i2i_dist.methods import resolve
from i2i_dist.methods.stargan import CriticInput
from i2i_dist.pool import ImagePools
from i2i_dist.schedules import LinearDecay
from i2i_dist.step import update
from tests.methods import plain_stargan as plain
from tests.methods.labelled_parts import (
    DRAWS,
    SIZE,
    SPACES,
    TINY,
    batch,
    build,
    detached,
    our_rates,
    part,
    released_rates,
)
from tests.methods.plain_networks import assert_same, gradients
from tests.methods.plain_side import plain_sides
from tests.ranks import ROOT

IMAGES = 3


def read(method: Any, kind: str, images: Tensor, labels: Tensor) -> Tensor:
    """What is read of the labels, by the kind of label space."""
    critic = method.discriminator.critic
    if kind == "attributes":
        return plain.of_attributes(critic, images, labels)
    if kind == "choice":
        return plain.of_choice(critic, images, labels)
    logits = plain.head(critic.to_classes, plain.trunk(critic, images))
    free = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, [0, 5]], labels[:, [0, 5]], reduction="none")
    return free.sum() / len(images) - logits[:, 1:5].log_softmax(1)[labels[:, 1:5].bool()].mean()


@pytest.mark.parametrize("kind", SPACES)
def test_the_generators_terms_and_gradients_are_those_of_separate_passes(kind: str) -> None:
    method = build("stargan", **SPACES[kind])
    given, g, d = batch(method, IMAGES), method.generator.generator, method.discriminator.critic
    terms = method.generator_loss(given, method.generator(given, DRAWS), method.discriminator, 0)
    mine = gradients(method.generator, terms)
    assert given.others is not None and given.labels is not None
    fake = plain.generator(g, given.images, given.others)
    expected = {
        "gan_fake": -plain.realness(d, fake).mean(),
        "class_fake": read(method, kind, fake, given.others),
        "cycle": 10 * (given.images - plain.generator(g, fake, given.labels)).abs().mean(),
    }
    assert_same(terms, expected)
    assert all(abs(float(term.detach())) > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    assert_same(mine, gradients(method.generator, expected), 1e-10)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert all(bool(value.any()) for value in mine.values())


@pytest.mark.parametrize("kind", SPACES)
def test_the_critics_terms_and_gradients_are_those_of_separate_passes(kind: str) -> None:
    """The penalty's own gradient among them, which goes through the critic's gradient."""
    method = build("stargan", **SPACES[kind])
    given, d = batch(method, IMAGES), method.discriminator.critic
    outputs = method.generator(given, DRAWS, True)
    terms = method.discriminator_loss(given, detached(outputs), method.discriminator, 0)
    mine = gradients(method.discriminator, terms)
    assert given.labels is not None
    real, fake = given.images, outputs.fake.detach()
    alpha = DRAWS.uniform("mixed", given.positions)
    expected = {
        "critic": -plain.realness(d, real).mean() + plain.realness(d, fake).mean(),
        "penalty": 10 * plain.penalty(d, real, fake, alpha),
        "class_real": read(method, kind, real, given.labels),
    }
    assert_same(terms, expected)
    assert all(abs(float(term.detach())) > 1e-3 for term in terms.values())
    assert_same(mine, gradients(method.discriminator, expected), 1e-10)
    assert mine.keys() == {name for name, _ in method.discriminator.named_parameters()}
    steep = gradients(method.discriminator, {"penalty": plain.penalty(d, real, fake, alpha)})
    assert float(steep["critic.stages.0.weight"].abs().max()) > 1e-2


def test_pictures_are_mixed_each_by_its_own_share_and_as_constants() -> None:
    method = build("stargan")
    given = batch(method, IMAGES)
    outputs = method.generator(given, DRAWS)
    shares = DRAWS.uniform("mixed", given.positions).double()[:, None, None, None]
    expected = shares * given.images + (1 - shares) * outputs.fake.detach()
    assert torch.allclose(outputs.mixed, expected, atol=1e-14) and not outputs.mixed.requires_grad
    assert len(set(shares.flatten().tolist())) == IMAGES
    apart = torch.cat([method.generator(part(given, slice(n, n + 1)), DRAWS, True).mixed for n in range(IMAGES)])
    assert torch.allclose(apart, outputs.mixed, atol=1e-12)  # whatever micro-batches there are


def test_no_gradient_of_the_critics_turn_reaches_the_generator_and_none_of_the_generators_the_critic() -> None:
    method = build("stargan", critic_turns=1)
    given, sides = batch(method, IMAGES), plain_sides(method)
    outputs = method.generator(given, DRAWS)  # with its graph, as where both turns share it
    shown = outputs._replace(fake=outputs.fake.detach())
    gradients(method.discriminator, method.discriminator_loss(given, shown, method.discriminator, 0))
    assert all(p.grad is None for p in method.generator.parameters())
    method.discriminator.zero_grad()
    with sides["discriminator"].frozen() as judge:
        gradients(method.generator, method.generator_loss(given, outputs, judge, 0))
    assert all(p.grad is None for p in method.discriminator.parameters())


def test_the_critic_reads_in_one_pass_what_it_reads_in_many() -> None:
    method = build("stargan")
    given = batch(method, IMAGES)
    whole = method.discriminator(CriticInput(given.images, mixed=given.images))
    apart = [method.discriminator(CriticInput(x[None], mixed=x[None])) for x in given.images]
    for field in ("patches", "classes"):
        assert torch.allclose(
            getattr(whole.reading, field), torch.cat([getattr(one.reading, field) for one in apart]), atol=1e-12
        )
    assert torch.allclose(whole.norms, torch.cat([one.norms for one in apart]), atol=1e-12)
    assert method.discriminator(CriticInput(given.images)).norms is None


@pytest.mark.parametrize("turns", [1, 3, 5])
def test_the_generator_has_every_nth_turn_and_sees_the_same_images(turns: int) -> None:
    method = build("stargan", critic_turns=turns, lr=0.0)
    given, sides, seen = batch(method, IMAGES), plain_sides(method), []
    for number in range(2 * turns):
        losses = update(method, sides, [given], ImagePools((), 0, 0), seed=3, number=number, images_seen=0).losses
        seen.append(frozenset(losses))
    of_critic = {"critic", "penalty", "class_real"}
    expected = [of_critic] * (turns - 1) + [of_critic | {"gan_fake", "class_fake", "cycle"}]
    assert seen == expected * 2
    assert all(method.turns(number)[0] == "discriminator" for number in range(10))


def test_the_official_generator_trains_at_updates_4_9_14() -> None:
    method = build("stargan")
    assert [number for number in range(20) if "generator" in method.turns(number)] == [4, 9, 14, 19]


def test_targets_are_labels_of_others_or_drawn_from_the_space() -> None:
    of_data, of_space = build("stargan"), build("stargan", targets="space")
    given = batch(of_data, 200)
    assert of_data._targets(given, DRAWS) is given.others
    drawn = of_space._targets(given, DRAWS)
    assert set(of_space.label_space.numbers(drawn.numpy().astype(int)).tolist()) == set(range(16))
    assert torch.equal(of_space._targets(part(given, slice(50, 60)), DRAWS), drawn[50:60])  # keyed by position


def test_a_row_is_translated_as_its_label_says_and_as_if_it_were_alone() -> None:
    method = build("stargan")
    assert isinstance(method, Labelled)
    given = batch(method, IMAGES)
    assert given.labels is not None
    made = method.translate_labelled(given.images, given.labels)
    assert torch.allclose(made, plain.generator(method.generator.generator, given.images, given.labels), atol=1e-12)
    alone = [method.translate_labelled(x[None], y[None]) for x, y in zip(given.images, given.labels, strict=True)]
    assert torch.allclose(torch.cat(alone), made, atol=1e-12)
    turned = method.translate_labelled(given.images, 1 - given.labels)
    assert float((turned - made).detach().abs().amax((1, 2, 3)).min()) > 1e-2
    first = torch.from_numpy(method.label_space.classes[:1]).double().expand(IMAGES, -1)
    expected = method.translate_labelled(given.images, first)
    assert torch.equal(method.translate(given.images, "a_to_b"), expected)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (32, 16)])
def test_the_generator_takes_other_sizes_than_the_critic(size: tuple[int, int]) -> None:
    method = build("stargan")
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    assert method.translate(image, "a_to_b").shape == image.shape
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]}; its heads are made for {SIZE} x {SIZE}"):
        method.discriminator(CriticInput(image))


def test_a_size_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="10 x 16; height and width must be multiples of 4"):
        build("stargan").translate(torch.zeros(1, 3, 10, 16, dtype=torch.float64), "a_to_b")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 100}, "image_size: given 100, allowed with critic_layers=3 is a multiple of 8"),
        ({"attributes": ["Male"]}, "a group names 'Black_Hair', which is not among the attributes Male"),
        ({"attributes": []}, "attributes is empty"),
        ({"exactly_one": [["Male", "Black_Hair"]]}, "Black_Hair stands twice in the groups"),
        ({"labelled_fraction": 0.0}, r"method\.labelled_fraction: given 0.0"),
        ({"lr_constant": 1.5}, r"method\.lr_constant: given 1.5"),
        ({"targets": "spaces"}, "did you mean 'space'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve({"name": "stargan", **TINY, **changes})


@pytest.mark.parametrize("name", ["stargan_celeba", "matchgan_celeba", "matchgan_rafd"])
def test_the_rate_falls_as_in_the_released_loop(name: str) -> None:
    """Of 200,000 updates of 16 images; by a thousandth in all, or, as the text says, to nothing."""
    loaded = configuration.load(ROOT / "configs" / f"{name}.yaml")
    size, told = loaded.train.global_batch, loaded.schedule
    schedule = LinearDecay(told.epoch_images or 0, told.constant_epochs, told.decay_epochs, told.decay_step)
    assert schedule.total_images == 200_000 * size
    updates = range(99_500, 200_000, 500)  # in the middle of each stair, and where it begins
    released = released_rates(updates, 1e-4)
    assert our_rates(build(loaded.method["name"]), schedule, updates, size) == pytest.approx(released, rel=1e-9)
    assert min(released.values()) == pytest.approx(1e-4 * (1 - 99e-5))
    linear = our_rates(build(loaded.method["name"], preset="paper"), schedule, updates, size)
    assert linear == pytest.approx({i: 1e-4 * (1 - max(0, i // 1000 - 100) / 100) for i in updates}, rel=1e-9)
    assert linear[199_500] == pytest.approx(1e-6)


def test_weights_stand_at_their_terms() -> None:
    one, weights = build("stargan"), {"lambda_gan": 3.0, "lambda_gp": 5.0, "lambda_cls": 2.0, "lambda_rec": 1.0}
    factors = {
        "gan_fake": 3.0, "critic": 3.0, "penalty": 0.5, "class_fake": 2.0, "class_real": 2.0, "cycle": 0.1,
    }  # fmt: skip
    made = []
    for method in (one, build("stargan", **weights)):
        given = batch(method, IMAGES)
        outputs = method.generator(given, DRAWS)
        terms = method.generator_loss(given, outputs, method.discriminator, 0)
        made.append(terms | method.discriminator_loss(given, detached(outputs), method.discriminator, 0))
    assert made[0].keys() == factors.keys()
    assert_same(made[1], {name: factors[name] * term for name, term in made[0].items()})


def test_fakes_alone_are_the_same_fakes() -> None:
    method = build("stargan")
    given = batch(method, IMAGES)
    alone, full = method.generator(given, DRAWS, True), method.generator(given, DRAWS)
    assert torch.allclose(alone.fake, full.fake, atol=1e-12) and torch.allclose(alone.mixed, full.mixed, atol=1e-12)
    assert alone.target is alone.reconstructed is None and full.reconstructed is not None


def test_networks_have_as_many_parameters_as_the_authors_code() -> None:
    emotions = {f"emotion_{number}": 0 for number in range(8)}
    for section, generator, critic in (
        ({"name": "stargan"}, 8_430_528, 44_762_048),
        ({"name": "matchgan"}, 8_430_528, 44_794_816),
        ({"name": "matchgan", "attributes": [*emotions], "at_most_one": []}, 8_439_936, 44_819_392),
    ):
        method_class, config = resolve(section)
        with torch.device("meta"):
            method = method_class(config, torch.Generator("cpu"))
        counts = [sum(p.numel() for p in getattr(method, side).parameters()) for side in SIDES]
        assert counts == [generator, critic]


def test_initial_values_are_pytorchs_default_drawn_from_the_one_generator() -> None:
    method_class, config = resolve({"name": "stargan", **TINY, "width": 16, "critic_width": 16})
    torch.manual_seed(1)
    method, again = (method_class(config, torch.Generator().manual_seed(0)) for _ in range(2))
    for side in SIDES:
        state, other = getattr(method, side).state_dict(), getattr(again, side).state_dict()
        assert all(torch.equal(state[key], other[key]) for key in state)
        for name, p in state.items():
            owner, _, kind = name.rpartition(".")
            if kind in ("gamma", "beta"):
                assert (p == {"gamma": 1.0, "beta": 0.0}[kind]).all()
                continue
            bound = 1 / math.sqrt(state[f"{owner}.weight"][0].numel())
            assert float(p.abs().max()) <= bound
            assert p.numel() < 500 or abs(float(p.std()) * 3**0.5 / bound - 1) < 0.1


def test_presets() -> None:
    official, paper = (resolve({"name": "stargan", "preset": preset})[1] for preset in ("official", "paper"))
    hair = ("Black_Hair", "Blond_Hair", "Brown_Hair")
    assert official.model_dump() == {
        "name": "stargan", "preset": "official", "attributes": (*hair, "Male", "Young"), "at_most_one": (hair,),
        "exactly_one": (), "labelled_fraction": 1.0, "image_size": 128, "width": 64, "blocks": 6, "critic_width": 64,
        "critic_layers": 6, "critic_turns": 5, "lambda_gan": 1.0, "lambda_gp": 10.0, "lambda_cls": 1.0,
        "lambda_rec": 10.0, "lr": 1e-4, "lr_constant": 0.999, "betas": (0.5, 0.999), "targets": "data",
    }  # fmt: skip
    assert paper.model_dump() == official.model_dump() | {"preset": "paper", "lr_constant": 0.0}


def test_samples_are_one_by_one() -> None:
    method = build("stargan", labelled_fraction=0.3)
    assert (method.group, method.labelled_group, method.streams) == (1, None, ("labelled",))
    assert method.labelled_fraction == 0.3 and not method.couples_batch and method.penalised
