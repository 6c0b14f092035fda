"""CUT and FastCUT: every preset is what a second reading of the released code computes, flips included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.config import ConfigError
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.patch_nce import patch_nce
from i2i_dist.method import SIDES
from i2i_dist.methods import resolve
from i2i_dist.methods.cut import CUT, Outputs, mirrored
from tests.methods import plain_networks as plain
from tests.methods.plain_networks import SIZE, assert_same, batch, gradients

SMALL = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 16, "nce_patches": 24,
    "nce_layers": ["rgb", "down1", "down2", "block2"],
}  # fmt: skip
LAYERS = ("rgb", "down1", "down2", "block2")
# Updates in which pictures are flipped, and in which they are not.
POSITIONS = {
    flipped: next(i for i in range(0, 999, 8) if Draws(3, i).coin("flip") == flipped) for flipped in (False, True)
}
DRAWS = Draws(3, POSITIONS[False])


def build(**changes: Any) -> Any:
    return plain.build({"name": "cut", **SMALL, **changes})


class Reading(NamedTuple):
    """A method section, and what the released code does at these settings."""

    section: dict[str, Any]
    flips: bool
    weight: float  # of each PatchNCE term
    identity: bool


READINGS = [
    Reading({"preset": "official"}, False, 0.5, True),
    Reading({"preset": "paper"}, False, 1.0, True),
    Reading({"preset": "fastcut"}, True, 10.0, False),
    Reading({"flip_equivariance": True}, True, 0.5, True),  # flips both domains, the identity's too
]


def plain_terms(
    method: Any, reading: Reading, given: Batch, draws: Draws
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the generator's and the critic's terms and the fakes, all passes apart, flips done on whole maps."""
    network, head, critic = method.generator.generator_ab, method.generator.head, method.discriminator.critic_b
    flip = reading.flips and draws.coin("flip")

    def turned(x: Tensor) -> Tensor:
        return torch.flip(x, [3]) if flip else x

    def term(purpose: str, source: Tensor) -> Tensor:
        made = plain.generator_maps(network, turned(source))["image"]
        queries, keys = plain.generator_maps(network, made), plain.generator_maps(network, source)
        losses = []
        for number, layer in enumerate(LAYERS):
            ids = draws.patch_ids(f"{purpose}.{layer}", math.prod(keys[layer].shape[2:]), 24)
            query = plain.head_rows(head, number, turned(queries[layer]), ids)
            losses.append(plain.nce(query, plain.head_rows(head, number, keys[layer], ids)))
        return torch.stack(losses).mean()

    fake = plain.generator_maps(network, turned(given.a))["image"]
    terms = {
        "gan_ab": (plain.logits(critic, fake) - 1).pow(2).mean(),
        "nce_ab": reading.weight * term("ab", given.a),
    }
    if reading.identity:
        terms["nce_identity"] = reading.weight * term("identity", given.b)
    on_real, on_fake = plain.logits(critic, given.b), plain.logits(critic, fake.detach())
    return terms, {"critic_b": 0.5 * ((on_real - 1).pow(2).mean() + on_fake.pow(2).mean())}, fake


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: "-".join(map(str, reading.section.values())))
def test_losses_and_gradients_are_those_of_a_second_reading(reading: Reading, flipped: bool, images: int) -> None:
    method, given, draws = build(**reading.section), batch(images), Draws(3, POSITIONS[flipped])
    generator, critic, fake = plain_terms(method, reading, given, draws)
    outputs = method.generator(given, draws)
    assert_same({"fake": outputs.fake_b}, {"fake": fake}, 1e-12)

    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert_same(terms, generator)
    assert all(term.item() > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    mine, theirs = gradients(method.generator, terms), gradients(method.generator, generator)
    assert_same(mine, theirs)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert sum(float(value.abs().max()) > 1e-6 for value in mine.values()) > len(mine) // 2

    terms = method.discriminator_loss(given, Outputs(outputs.fake_b.detach()), method.discriminator, 0)
    assert_same(terms, critic)
    assert_same(gradients(method.discriminator, terms), gradients(method.discriminator, critic))


class Unchanged(torch.nn.Module):
    """A generator that changes nothing and sees every pixel for itself, so that it commutes with a flip."""

    def forward(self, image: Tensor, taps: Sequence[str] = (), encode_only: bool = False) -> Any:
        return None if encode_only else image, (image,) * len(taps)


@pytest.mark.parametrize("flipped", [False, True])
def test_queries_are_flipped_back(flipped: bool) -> None:
    """They then lie where their keys do: what changes nothing yields the keys themselves."""
    method, given = build(flip_equivariance=True, nce_layers=["rgb"]), batch(2)
    method.generator.generator_ab = Unchanged()
    outputs = method.generator(given, Draws(3, POSITIONS[flipped]))
    assert torch.equal(outputs.fake_b, given.a.flip(3) if flipped else given.a)
    assert torch.equal(outputs.queries_fake_b[0], outputs.keys_a[0])
    assert torch.equal(outputs.queries_identity_b[0], outputs.keys_b[0])


@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 4), (1, 7)])
def test_mirrored_places_sample_the_flipped_map(height: int, width: int) -> None:
    image = torch.arange(height * width).view(height, width)
    ids = torch.randperm(height * width)
    assert torch.equal(image.flatten()[mirrored(ids, width)], image.flip(1).flatten()[ids])


def test_a_flip_is_drawn_by_position_for_half_of_the_updates() -> None:
    given = batch(1)
    method, never = build(preset="fastcut"), build()
    mirrored_a = given._replace(a=given.a.flip(3))
    straight, flipped = never.generator(given, DRAWS).fake_b, never.generator(mirrored_a, DRAWS).fake_b
    assert not torch.allclose(straight, flipped, atol=1e-3)
    seen = []
    for position in range(0, 32, 4):
        fake = method.generator(given, Draws(3, position)).fake_b
        assert torch.equal(fake, method.generator(given, Draws(3, position)).fake_b)
        seen.append(torch.allclose(fake, flipped, atol=1e-12))
        assert seen[-1] or torch.allclose(fake, straight, atol=1e-12)
        assert torch.allclose(never.generator(given, Draws(3, position)).fake_b, straight, atol=1e-12)
    assert set(seen) == {True, False}
    assert 400 < sum(Draws(3, position).coin("flip") for position in range(1000)) < 600


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("preset", ["official", "fastcut"])
def test_fakes_alone_are_the_same_fakes(preset: str, flipped: bool) -> None:
    method, given, draws = build(preset=preset), batch(2), Draws(3, POSITIONS[flipped])
    alone, full = method.generator(given, draws, True), method.generator(given, draws)
    assert_same({"b": alone.fake_b}, {"b": full.fake_b}, 1e-12)
    assert alone[1:] == ((),) * 4


@pytest.mark.parametrize(
    ("preset", "flipped", "expected"),
    [("official", False, [2, 2]), ("fastcut", False, [1, 1]), ("fastcut", True, [1, 1, 1])],
)
def test_no_pass_is_made_twice(preset: str, flipped: bool, expected: list[int]) -> None:
    """The translation, the encoding of what came out, and with a flip the encoding of what it was made from."""
    method, images = build(preset=preset), []
    method.generator.generator_ab.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    method.generator(batch(1), Draws(3, POSITIONS[flipped]))
    assert images == expected


def test_keys_get_no_gradient() -> None:
    for preset in ("official", "fastcut"):
        outputs = build(preset=preset).generator(batch(1), DRAWS)
        assert not any(key.requires_grad for key in (*outputs.keys_a, *outputs.keys_b))
        assert all(query.requires_grad for query in (*outputs.queries_fake_b, *outputs.queries_identity_b))


def test_test_values_of_patch_nce() -> None:
    """All similarities equal: ln 256. Queries equal to orthonormal keys: ln(1 + 255 exp(-1 / 0.07))."""
    method = build()
    for rows, expected in (
        (torch.ones(1, 256, 256, dtype=torch.float64), math.log(256)),
        (torch.eye(256, dtype=torch.float64)[None], math.log1p(255 * math.exp(-1 / 0.07))),
    ):
        outputs = Outputs(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64), *((rows,),) * 4)
        terms = method.generator_loss(batch(1), outputs, method.discriminator, 0)
        assert terms["nce_ab"].item() == pytest.approx(0.5 * expected, rel=1e-5)
        assert terms["nce_identity"].item() == pytest.approx(0.5 * expected, rel=1e-5)
    assert expected == pytest.approx(1.593e-4, rel=1e-3)


def test_the_norm_has_1e_7_added() -> None:
    """Rows as short as a head's are at the start tell it from the cosine."""
    draw = torch.Generator().manual_seed(2)
    queries, keys = (torch.randn(1, 24, 16, generator=draw, dtype=torch.float64) * 1e-7 for _ in range(2))
    method, fake = build(), torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)
    terms = method.generator_loss(batch(1), Outputs(fake, *((keys,), (queries,)) * 2), method.discriminator, 0)
    expected = 0.5 * plain.nce(plain.normalised(queries), plain.normalised(keys)).item()
    assert terms["nce_ab"].item() == pytest.approx(expected, rel=1e-9)
    cosine = patch_nce([queries], [keys], eps=0.0).item()
    assert abs(terms["nce_ab"].item() - 0.5 * cosine) > 1e-2


def test_negatives_of_the_whole_batch() -> None:
    """Other images' patches are negatives too; with one image there are none. No process group: one rank."""
    for images in (1, 2):
        given, image, everything = batch(images), build(), build(negatives="global_batch")
        assert everything.couples_batch and not image.couples_batch
        outputs = image.generator(given, DRAWS)
        one = image.generator_loss(given, outputs, image.discriminator, 0)
        other = everything.generator_loss(given, outputs, everything.discriminator, 0)
        for name, queries, keys in (
            ("nce_ab", outputs.queries_fake_b, outputs.keys_a),
            ("nce_identity", outputs.queries_identity_b, outputs.keys_b),
        ):
            layers = [
                plain.nce(*(plain.normalised(x).flatten(0, 1)[None] for x in (query, key)))
                for query, key in zip(queries, keys, strict=True)
            ]
            assert other[name].item() == pytest.approx(0.5 * torch.stack(layers).mean().item(), abs=1e-10)
            assert (abs((one[name] - other[name]).item()) < 1e-12) == (images == 1)


def test_weights_stand_at_their_terms() -> None:
    given, one = batch(1), build()
    outputs = one.generator(given, DRAWS)
    terms = one.generator_loss(given, outputs, one.discriminator, 0)
    changed = build(lambda_gan=3.0, lambda_nce=5.0, halved=False)
    weighted = changed.generator_loss(given, outputs, changed.discriminator, 0)
    factors = {"gan_ab": 3.0, "nce_ab": 10.0, "nce_identity": 10.0}
    assert_same(weighted, {name: factors[name] * term for name, term in terms.items()})
    warmer = build(temperature=0.5).generator_loss(given, outputs, one.discriminator, 0)
    assert abs((warmer["nce_ab"] - terms["nce_ab"]).item()) > 1e-2


def test_presets() -> None:
    official, paper, fast = (resolve({"name": "cut", "preset": p})[1].model_dump() for p in CUT.PRESETS)
    assert official == {
        "name": "cut", "preset": "official", "width": 64, "blocks": 9, "critic_width": 64, "head_dim": 256,
        "nce_layers": ("rgb", "down1", "down2", "block1", "block5"), "nce_patches": 256, "nce_identity": True,
        "temperature": 0.07, "negatives": "image", "flip_equivariance": False, "adversarial": "lsgan",
        "lambda_gan": 1.0, "lambda_nce": 1.0, "halved": True, "lr": 2e-4, "betas": (0.5, 0.999),
    }  # fmt: skip
    assert paper == official | {"preset": "paper", "halved": False}
    assert fast == official | {
        "preset": "fastcut",
        "lambda_nce": 10.0,
        "nce_identity": False,
        "flip_equivariance": True,
    }


def test_the_whole_method_has_as_many_parameters_as_the_released_code() -> None:
    method_class, config = resolve({"name": "cut"})
    with torch.device("meta"):
        method: Any = method_class(config, torch.Generator("cpu"))
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == 14_703_300
    assert sum(p.numel() for p in method.generator.head.parameters()) == 560_384


def test_the_features_of_256_pixels() -> None:
    """256 patches of each layer; the RGB layer is the padded picture with its three channels."""
    method_class, config = resolve({"name": "cut", "width": 4, "critic_width": 4, "head_dim": 8})
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    channels = method.generator.generator_ab.tap_channels(config.nce_layers)  # type: ignore[attr-defined]
    assert channels == (3, 8, 16, 16, 16)
    image = torch.rand(1, 3, 256, 256)
    outputs = method.generator(Batch(image, image, torch.arange(1), 0), Draws(0, 0))
    assert outputs.fake_b.shape == image.shape
    for features in outputs[1:]:
        assert [x.shape for x in features] == [(1, 256, 8)] * 5
    _, (rgb, *_) = method.generator.generator_ab(image, config.nce_layers, encode_only=True)  # type: ignore[attr-defined]
    assert torch.equal(rgb, F.pad(image, (3, 3, 3, 3), mode="reflect"))


def test_layers_with_fewer_locations_give_all_of_them() -> None:
    outputs = build(nce_patches=100).generator(batch(2), DRAWS)
    assert [x.shape for x in outputs.keys_a] == [(2, 100, 16)] * 3 + [(2, 64, 16)]


def test_all_parameters_have_the_rate_of_the_configuration() -> None:
    groups = build(lr=3e-4, betas=[0.4, 0.9]).parameter_groups()
    assert all((group.lr, group.betas) == (3e-4, (0.4, 0.9)) for side in SIDES for group in groups[side])


def test_the_critic_has_the_first_turn_and_there_is_no_pool() -> None:
    method = build()
    expected = "discriminator", "generator"
    assert all(method.turns(number) == expected for number in (0, 1, 17))
    assert (method.pool_size, method.fakes, method.directions) == (0, ("fake_b",), ("a_to_b",))


def test_translate() -> None:
    method, image = build(preset="fastcut"), torch.rand(2, 3, 24, 40, dtype=torch.float64) * 2 - 1
    translated = method.translate(image, "a_to_b")
    assert torch.allclose(translated, plain.generator_maps(method.generator.generator_ab, image)["image"], atol=1e-12)


def test_weights_follow_from_the_generator_given() -> None:
    method_class, config = resolve({"name": "cut", **SMALL})

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # has no say
        method: Any = method_class(config, torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for side in SIDES for p in getattr(method, side).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_layers_that_no_generator_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"nce_layers: no feature map is called 'block3'; allowed is rgb"):
        resolve({"name": "cut", "blocks": 2, "nce_layers": ["rgb", "block3"]})
    with pytest.raises(ConfigError, match=r"nce_layers: 'rgb' stands there more than once"):
        resolve({"name": "cut", "nce_layers": ["rgb", "rgb"]})
