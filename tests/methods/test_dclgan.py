"""DCLGAN: what is computed once in shared passes is what a second reading computes in separate ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.config import ConfigError
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.method import SIDES
from i2i_dist.methods import resolve
from i2i_dist.methods.dclgan import Outputs
from i2i_dist.networks.critics import DomainPair
from tests.methods import plain_networks as plain
from tests.methods.plain_networks import SIZE, assert_same, batch, gradients

SMALL = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 16, "nce_patches": 24,
    "nce_layers": ["down1", "down2", "block2"],
}  # fmt: skip
LAYERS = ("down1", "down2", "block2")
DRAWS = Draws(seed=3, update_position=64)


def build(**changes: Any) -> Any:
    return plain.build({"name": "dclgan", **SMALL, **changes})


def nce(queries: Any, keys: Any, whole_batch: bool = False) -> Tensor:
    """Means over the layers; the released code normalises a second time, by the cosine."""
    layers = []
    for pair in zip(queries, keys, strict=True):
        rows = [F.normalize(x, dim=2) for x in pair]
        layers.append(plain.nce(*(x.flatten(0, 1)[None] if whole_batch else x for x in rows)))
    return torch.stack(layers).mean()


def plain_terms(method: Any, given: Batch) -> dict[str, Tensor]:
    """Return the generator's terms, every pass of the released code on its own."""
    g, d = method.generator, method.discriminator
    half = {"official": 0.5, "paper": 1.0}[method.config.preset]

    def rows(network: Any, head: Any, direction: str, image: Tensor) -> list[Tensor]:
        maps = plain.generator_maps(network, image)
        ids = [DRAWS.patch_ids(f"{direction}.{layer}", math.prod(maps[layer].shape[2:]), 24) for layer in LAYERS]
        return [plain.head_rows(head, i, maps[layer], ids[i]) for i, layer in enumerate(LAYERS)]

    def made(network: Any, image: Tensor) -> Tensor:
        return plain.generator_maps(network, image)["image"]

    of_a, of_b = (g.generator_ab, g.head_a), (g.generator_ba, g.head_b)
    fake_b, fake_a = made(g.generator_ab, given.a), made(g.generator_ba, given.b)
    return {
        "gan_ab": half * F.relu(1 - plain.logits(d.critic_b, fake_b)).mean(),
        "gan_ba": half * F.relu(1 - plain.logits(d.critic_a, fake_a)).mean(),
        "nce_ab": half * 2 * nce(rows(*of_b, "ab", fake_b), rows(*of_a, "ab", given.a)),
        "nce_ba": half * 2 * nce(rows(*of_a, "ba", fake_a), rows(*of_b, "ba", given.b)),
        "identity_a": half * F.l1_loss(made(g.generator_ba, given.a), given.a),
        "identity_b": half * F.l1_loss(made(g.generator_ab, given.b), given.b),
    }


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_losses_and_gradients_are_those_of_a_second_reading(preset: str, images: int) -> None:
    method, given = build(preset=preset), batch(images)
    outputs, official = method.generator(given, DRAWS), plain_terms(method, given)
    assert all(not key.requires_grad for key in (*outputs.keys_a, *outputs.keys_b))
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert_same(terms, official)
    assert all(term.item() > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    mine, theirs = gradients(method.generator, terms), gradients(method.generator, official)
    assert_same(mine, theirs)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert sum(float(value.abs().max()) > 1e-6 for value in mine.values()) > len(mine) // 2


def test_critics_see_both_in_one_pass() -> None:
    method, given = build(), batch(2)
    fakes = method.generator(given, DRAWS, True)
    shown = Outputs(fakes.fake_a.detach(), fakes.fake_b.detach())
    d = method.discriminator
    official = {
        name: 0.5 * F.relu(1 - plain.logits(critic, real)).mean() + 0.5 * F.relu(1 + plain.logits(critic, fake)).mean()
        for name, critic, real, fake in (
            ("critic_a", d.critic_a, given.a, shown.fake_a),
            ("critic_b", d.critic_b, given.b, shown.fake_b),
        )
    }
    terms = method.discriminator_loss(given, shown, d, 0)
    assert_same(terms, official)
    assert_same(gradients(d, terms), gradients(d, official))


def test_fakes_alone_are_the_same_fakes() -> None:
    method, given = build(), batch(2)
    alone, full = method.generator(given, DRAWS, True), method.generator(given, DRAWS)
    assert_same({"a": alone.fake_a, "b": alone.fake_b}, {"a": full.fake_a, "b": full.fake_b}, 1e-12)
    assert alone.identity_a is None
    assert alone.queries_a == ()


def test_weights_stand_at_their_terms() -> None:
    given, one = batch(1), build()
    changed = build(lambda_gan=3.0, lambda_nce=5.0, lambda_identity=7.0, halved=False)
    terms = one.generator_loss(given, one.generator(given, DRAWS), one.discriminator, 0)
    weighted = changed.generator_loss(given, changed.generator(given, DRAWS), changed.discriminator, 0)
    factors = {"gan": 2 * 3.0, "nce": 2 * 5.0 / 2.0, "identity": 2 * 7.0}
    assert_same(weighted, {name: factors[name.partition("_")[0]] * term for name, term in terms.items()})
    critics = changed.discriminator_loss(given, one.generator(given, DRAWS, True), changed.discriminator, 0)
    assert_same(critics, one.discriminator_loss(given, one.generator(given, DRAWS, True), one.discriminator, 0))


def test_temperature_reaches_the_loss() -> None:
    given, method = batch(1), build(temperature=0.5)
    outputs = method.generator(given, DRAWS)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert abs(terms["nce_ab"].item() - nce(outputs.queries_b, outputs.keys_a).item()) > 1e-2


def test_negatives_of_the_whole_batch() -> None:
    """Other images' patches are negatives too; with one image there are none. No process group: one rank."""
    for images in (1, 2):
        given, image, everything = batch(images), build(), build(negatives="global_batch")
        outputs = image.generator(given, DRAWS)
        one = image.generator_loss(given, outputs, image.discriminator, 0)
        other = everything.generator_loss(given, outputs, everything.discriminator, 0)
        for name, queries, keys in (
            ("nce_ab", outputs.queries_b, outputs.keys_a),
            ("nce_ba", outputs.queries_a, outputs.keys_b),
        ):
            assert other[name].item() == pytest.approx(nce(queries, keys, whole_batch=True).item(), abs=1e-10)
            assert (abs((one[name] - other[name]).item()) < 1e-12) == (images == 1)


def test_the_clamped_hinge_gives_no_gradient_beyond_1() -> None:
    method, given = build(), batch(1)
    fake = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    outputs = method.generator(given, DRAWS)._replace(fake_a=fake, fake_b=fake)

    def sure(images: DomainPair) -> DomainPair:
        return DomainPair(images.a.mean() + 2.0, images.b.mean() + 2.0)

    terms = method.generator_loss(given, outputs, sure, 0)
    (gradient,) = torch.autograd.grad(terms["gan_ab"] + terms["gan_ba"], fake)
    assert terms["gan_ab"].item() == 0.0
    assert not gradient.any()


def test_presets() -> None:
    official, paper = (resolve({"name": "dclgan", "preset": preset})[1] for preset in ("official", "paper"))
    assert official.model_dump() | {"nce_layers": ["down1", "down2", "block1", "block5"]} == {
        "name": "dclgan", "preset": "official", "width": 64, "blocks": 9, "critic_width": 64, "head_dim": 256,
        "nce_layers": ["down1", "down2", "block1", "block5"], "nce_patches": 256, "temperature": 0.07,
        "negatives": "image", "adversarial": "hinge", "lambda_gan": 1.0, "lambda_nce": 2.0, "lambda_identity": 1.0,
        "halved": True, "pool_size": 0, "lr": 2e-4, "lr_heads": 1e-3, "betas": (0.5, 0.999),
        "betas_heads": (0.9, 0.999),
    }  # fmt: skip
    differing = {key for key, value in official.model_dump().items() if paper.model_dump()[key] != value}
    assert differing == {"preset", "lr", "lr_heads", "betas_heads", "pool_size", "halved"}
    assert (paper.lr, paper.pool_size) == (1e-4, 50)  # type: ignore[attr-defined]


def test_the_whole_method_has_as_many_parameters_as_the_released_code() -> None:
    method_class, config = resolve({"name": "dclgan"})
    with torch.device("meta"):
        method = method_class(config, torch.Generator("cpu"))
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == 29_272_968


def test_the_heads_have_a_rate_of_their_own() -> None:
    method = build()
    groups = method.parameter_groups()
    heads = {id(p) for head in (method.generator.head_a, method.generator.head_b) for p in head.parameters()}
    for group in groups["generator"]:
        in_heads = {id(p) for p in group.parameters} == heads
        assert (group.lr, group.betas) == ((1e-3, (0.9, 0.999)) if in_heads else (2e-4, (0.5, 0.999)))
    assert [group.name for group in groups["generator"]] == ["generators", "heads"]


def test_the_critics_have_the_first_turn() -> None:
    expected = "discriminator", "generator"
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


def test_weights_follow_from_the_generator_given() -> None:
    method_class, config = resolve({"name": "dclgan", **SMALL})

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # has no say
        method: Any = method_class(config, torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for side in SIDES for p in getattr(method, side).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("layer", ["block0", "block3", "block01", "down3", "4", ""])
def test_layers_that_no_generator_has_are_refused(layer: str) -> None:
    with pytest.raises(ConfigError, match="allowed is rgb, down1, down2, block1 to block2"):
        resolve({"name": "dclgan", "blocks": 2, "nce_layers": ["down1", layer]})


def test_a_layer_nearly_right_or_twice_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"nce_layers: no feature map is called 'dwn1'; .* did you mean 'down1'\?"):
        resolve({"name": "dclgan", "nce_layers": ["dwn1"]})
    with pytest.raises(ConfigError, match=r"nce_layers: 'down1' stands there more than once"):
        resolve({"name": "dclgan", "nce_layers": ["down1", "block1", "down1"]})
