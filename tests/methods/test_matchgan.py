"""MatchGAN: losses and gradients against torch.nn.functional with and without labels, groups, targets, streams."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist.config import ConfigError
from i2i_dist.losses.labels import match_loss, match_pairs
from i2i_dist.method import Labelled
from i2i_dist.methods import resolve
from i2i_dist.methods.stargan import CriticInput
from i2i_dist.pool import ImagePools
from i2i_dist.step import update
from tests.methods import plain_stargan as plain
from tests.methods.labelled_parts import DRAWS, SPACES, TINY, batch, build, detached, part
from tests.methods.plain_networks import assert_same, gradients
from tests.methods.plain_side import plain_sides

# The groups' shapes, and how many groups there are.
SHAPES = [((4, 4), 1), ((4, 4), 2), ((3, 2), 2), ((2, 2), 3)]
HALF = {"labelled_fraction": 0.5}


def grouped(shape: tuple[int, int], **changes: Any) -> Any:
    return build("matchgan", group_classes=shape[0], group_images=shape[1], **HALF, **changes)


def targets(method: Any, positions: Tensor) -> Tensor:
    """The labels that the translations are to have, from the draws alone: a, b, c, d, a, b, c, d, ..."""
    classes, each = method.labelled_group
    rows = []
    for first in positions.tolist()[:: classes * each]:
        drawn = DRAWS.distinct("target", torch.tensor([first]), len(method.label_space.classes), classes)[0]
        rows += [method.label_space.classes[number].tolist() for _ in range(each) for number in drawn.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def compared(method: Any, groups: list[Tensor]) -> Tensor:
    return torch.stack([plain.comparison(method.discriminator.critic, group) for group in groups]).mean()


@pytest.mark.parametrize("told", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_generators_terms_and_gradients_are_those_of_separate_passes(
    shape: tuple[int, int], groups: int, told: bool
) -> None:
    method = grouped(shape)
    given, g, d = batch(method, groups * method.group, told), method.generator.generator, method.discriminator.critic
    terms = method.generator_loss(given, method.generator(given, DRAWS), method.discriminator, 0)
    mine, wanted = gradients(method.generator, terms), targets(method, given.positions)
    fake = plain.generator(g, given.images, wanted)
    expected = {
        "gan_fake": -plain.realness(d, fake).mean(),
        "class_fake": plain.of_attributes(d, fake, wanted),
        "match_fake": 0.5 * compared(method, plain.by_target(fake, *shape)),
    }
    if given.labels is not None:  # without them there is nothing to translate back to
        expected["cycle"] = 10 * (given.images - plain.generator(g, fake, given.labels)).abs().mean()
    assert_same(terms, expected)
    assert all(abs(float(term.detach())) > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    assert_same(mine, gradients(method.generator, expected), 1e-10)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}


@pytest.mark.parametrize("told", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_critics_terms_and_gradients_are_those_of_separate_passes(
    shape: tuple[int, int], groups: int, told: bool
) -> None:
    method = grouped(shape)
    given, d = batch(method, groups * method.group, told), method.discriminator.critic
    outputs = method.generator(given, DRAWS, True)
    terms = method.discriminator_loss(given, detached(outputs), method.discriminator, 0)
    mine = gradients(method.discriminator, terms)
    real, fake, alpha = given.images, outputs.fake.detach(), DRAWS.uniform("mixed", given.positions)
    expected = {
        "critic": -plain.realness(d, real).mean() + plain.realness(d, fake).mean(),
        "penalty": 10 * plain.penalty(d, real, fake, alpha),
    }
    if given.labels is not None:
        expected["class_real"] = plain.of_attributes(d, real, given.labels)
        expected["match_real"] = 0.5 * compared(method, plain.by_label(real, *shape))
    assert_same(terms, expected)
    assert all(abs(float(term.detach())) > 1e-3 for term in terms.values())
    assert_same(mine, gradients(method.discriminator, expected), 1e-10)
    unread = set() if told else {"critic.to_classes.weight", "critic.to_match.weight"}
    assert mine.keys() == {name for name, _ in method.discriminator.named_parameters()} - unread


def test_emotions_are_one_choice() -> None:
    method = grouped((4, 2), **SPACES["choice"])
    given = batch(method, 8)
    outputs = method.generator(given, DRAWS)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    terms |= method.discriminator_loss(given, detached(outputs), method.discriminator, 0)
    assert given.labels is not None
    d = method.discriminator.critic
    expected = plain.of_choice(d, given.images, given.labels), plain.of_choice(d, outputs.fake, outputs.target)
    assert torch.allclose(torch.stack([terms["class_real"], terms["class_fake"]]), torch.stack(expected), atol=1e-12)


@pytest.mark.parametrize("told", [True, False])
def test_each_class_of_a_group_gets_each_of_its_targets(told: bool) -> None:
    method = grouped((4, 4))
    given = batch(method, 48, told)
    numbers = torch.from_numpy(method.label_space.numbers(method._targets(given, DRAWS).numpy().astype(int)))
    assert torch.equal(method._targets(given, DRAWS).double(), targets(method, given.positions))
    for group in numbers.view(3, 4, 4):  # source class, member
        assert len(set(group[0].tolist())) == 4
        assert all(torch.equal(members, group[0]) for members in group)
    assert len({tuple(group[:4].tolist()) for group in numbers.view(3, 16)}) == 3
    assert torch.equal(method._targets(part(given, slice(16, 32)), DRAWS), method._targets(given, DRAWS)[16:32])


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_translations_are_compared_by_their_targets_and_pictures_by_their_labels(
    shape: tuple[int, int], groups: int
) -> None:
    """What counts as the same has the same label, what does not has another; a group never looks at the next."""
    method = grouped(shape)
    given = batch(method, groups * method.group)
    asked: list[Tensor] = []
    critic_forward = method.discriminator.forward

    def noted(question: Any) -> Any:
        asked.append(question.pairs)
        return critic_forward(question)

    method.discriminator.forward = noted
    outputs = method.generator(given, DRAWS)
    method.generator_loss(given, outputs, method.discriminator, 0)
    method.discriminator_loss(given, detached(outputs), method.discriminator, 0)
    _, same = method._of_all_groups(method._pairs, len(given.images))
    for pairs, labels in zip(asked, (outputs.target, given.labels), strict=True):
        first, second = pairs.unbind(1)
        assert len(pairs) == len(given.images)
        assert torch.equal((labels[first] == labels[second]).all(1), same.bool())
        assert torch.equal(first // method.group, second // method.group)
    assert torch.equal(asked[0] // method.group, asked[1] // method.group)


def test_four_by_four_translations_are_regrouped_by_the_transpose() -> None:
    method = grouped((4, 4))
    rows = method._by_target(torch.arange(16))
    assert torch.equal(rows, torch.arange(16).view(4, 4).T.flatten())


@pytest.mark.parametrize(
    ("fraction", "turns", "streams"),
    [
        (1.0, None, ["labelled"]),
        (0.999, None, ["labelled", "unlabelled"]),
        (1.0, True, ["labelled", "unlabelled"]),
        (0.999, False, ["labelled"]),
    ],
)
def test_with_all_labels_there_is_one_stream(fraction: float, turns: bool | None, streams: list[str]) -> None:
    method = build("matchgan", labelled_fraction=fraction, unlabelled_turns=turns)
    assert isinstance(method, Labelled)
    assert list(method.streams) == streams and method.labelled_fraction == fraction
    assert (method.group, method.labelled_group) == (16, (4, 4)) and not method.couples_batch and method.penalised


def test_updates_without_labels_lack_what_needs_them() -> None:
    """And the generator's turns, every fifth update, alternate between pictures with and without labels."""
    method = grouped((2, 2), lr=0.0)
    sides, seen = plain_sides(method), []
    for number in range(10):
        told = method.streams[number % 2] == "labelled"
        given = batch(method, 4, told)
        losses = update(method, sides, [given], ImagePools((), 0, 0), seed=3, number=number, images_seen=0).losses
        seen.append(set(losses))
    always, labelled = {"critic", "penalty"}, {"class_real", "match_real"}
    expected = [always | (set() if number % 2 else labelled) for number in range(10)]
    expected[4] = expected[4] | {"gan_fake", "class_fake", "match_fake", "cycle"}
    expected[9] = expected[9] | {"gan_fake", "class_fake", "match_fake"}
    assert seen == expected


def test_the_head_for_pairs_adds_up_what_it_finds_in_each_picture() -> None:
    """Exchanging the partners of two pairs leaves the sum of their logits, so that equality is beyond it."""
    method = build("matchgan")
    pictures = batch(method, 16).images
    pairs = torch.tensor([[0, 5], [9, 2], [0, 2], [9, 5]])
    logits = method.discriminator(CriticInput(pictures, pairs)).reading.matches
    assert float((logits[0] - logits[2]).detach().abs().max()) > 1e-3
    torch.testing.assert_close(logits[0] + logits[1], logits[2] + logits[3], rtol=0, atol=1e-12)


def test_the_head_for_differences_reads_how_far_two_pictures_are_apart() -> None:
    method = build("matchgan", match_head="difference")
    pictures, critic = batch(method, 16).images, method.discriminator.critic
    features = plain.trunk(critic, pictures)
    pairs = torch.tensor([[0, 5], [5, 0], [3, 3]])
    logits = method.discriminator(CriticInput(pictures, pairs)).reading.matches
    apart = (features[pairs[:, 0]] - features[pairs[:, 1]]).abs().flatten(1)
    layer = critic.to_match
    torch.testing.assert_close(logits, apart @ layer.weight.flatten(1).T + layer.bias, rtol=0, atol=1e-10)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], layer.bias) and layer.bias.all()


def test_the_best_sum_of_what_is_in_each_picture_is_chance() -> None:
    """Over the 16 pairs of all orders of four classes, fitted to the end: ln 2, while a table of pairs gets to 0."""
    rows, same = match_pairs(4, 4)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    classes = orders[:, rows // 4].flatten(0, 1)  # [24 * 16, 2]
    truth = same.repeat(len(orders))
    first, second, table = (torch.zeros(size, requires_grad=True) for size in ((4, 2), (4, 2), (4, 4, 2)))
    with torch.no_grad():
        for start in (first, second):
            start.normal_(generator=torch.Generator().manual_seed(0))
    fitted = {}
    for name, parameters, answer in (
        ("sum", [first, second], lambda: first[classes[:, 0]] + second[classes[:, 1]]),
        ("table", [table], lambda: table[classes[:, 0], classes[:, 1]]),
    ):
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        def loss(answer: Any = answer, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = match_loss(answer(), truth)
            value.backward()
            return value

        optimizer.step(loss)
        fitted[name] = float(loss().detach())
    assert fitted["sum"] == pytest.approx(math.log(2), abs=1e-5) and fitted["table"] < 0.01


def test_the_weight_stands_at_the_pairs() -> None:
    made = []
    for weight in (0.5, 2.0):
        method = grouped((2, 2), lambda_match=weight)
        given = batch(method, 4)
        outputs = method.generator(given, DRAWS)
        terms = method.generator_loss(given, outputs, method.discriminator, 0)
        made.append(terms | method.discriminator_loss(given, detached(outputs), method.discriminator, 0))
    assert_same(made[1], {name: term * (4.0 if "match" in name else 1.0) for name, term in made[0].items()})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_classes": 17}, "group_classes: given 17, allowed is at most 16, as there are"),
        ({"group_classes": 1}, r"method\.group_classes: given 1"),
        ({"group_images": 3}, r"method\.group_images: given 3, allowed is a multiple of 2"),
        ({"labelled_fraction": 0.2, "critic_turns": 4}, "critic_turns: given 4, .* is an odd number"),
        ({"targets": "data"}, r"method\.targets: unknown key"),
        ({"image_size": 100}, "image_size: given 100"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve({"name": "matchgan", **TINY, **changes})
    resolve({"name": "matchgan", **TINY, "critic_turns": 4})  # with all labels any number will do


def test_presets() -> None:
    stargan, official, paper = (
        resolve({"name": name, "preset": preset})[1].model_dump()
        for name, preset in (("stargan", "official"), ("matchgan", "official"), ("matchgan", "paper"))
    )
    del stargan["targets"]
    own = {"name": "matchgan", "group_classes": 4, "group_images": 4, "lambda_match": 0.5}
    own |= {"unlabelled_turns": None, "match_head": "joined"}
    assert official == stargan | own
    assert paper == official | {"preset": "paper", "lr_constant": 0.0}
