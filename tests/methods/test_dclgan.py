"""DCLGAN: what is computed once in shared passes is what the released code computes in separate ones."""

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
from i2i_dist.method import SIDES, Turn
from i2i_dist.methods import resolve
from i2i_dist.methods.dclgan import Outputs
from i2i_dist.networks.critics import DomainPair

SMALL = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 16, "nce_patches": 24,
    "nce_layers": ["down1", "down2", "block2"],
}  # fmt: skip
LAYERS = ("down1", "down2", "block2")
DRAWS = Draws(seed=3, update_position=64)
SIZE = 32


def build(seed: int = 0, **changes: Any) -> Any:
    """A small method in fp64, with weights large enough that nothing hides in rounding or behind a hinge."""
    method_class, config = resolve({"name": "dclgan", **SMALL, **changes})
    method: Any = method_class(config, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for side in (method.generator, method.discriminator):
            side.double()
            for parameter in side.parameters():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.mul_(10.0).add_(noise, alpha=0.05)
    return method


def batch(images: int, seed: int = 5) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(images, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Batch(a, b.abs(), torch.arange(images) + 64, 64)


def sampled(features: Tensor, ids: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).flatten(1, 2)[:, ids]


def separate(method: Any, given: Batch) -> Outputs:
    """Every pass of the released code on its own: four translations, four encodings, heads on what they sample."""
    g = method.generator

    def features(
        direction: str, source: Tensor, fake: Tensor, networks: Any, heads: Any
    ) -> tuple[list[Any], list[Any]]:
        keys = networks[0](source, LAYERS, encode_only=True)[1]
        queries = networks[1](fake, LAYERS, encode_only=True)[1]
        ids = [
            DRAWS.patch_ids(f"{direction}.{layer}", math.prod(key.shape[2:]), 24)
            for layer, key in zip(LAYERS, keys, strict=True)
        ]
        key_rows = [head(sampled(x, i)) for head, x, i in zip(heads[0].heads, keys, ids, strict=True)]
        query_rows = [head(sampled(x, i)) for head, x, i in zip(heads[1].heads, queries, ids, strict=True)]
        return key_rows, query_rows

    fake_b, fake_a = g.generator_ab(given.a)[0], g.generator_ba(given.b)[0]
    identity_b, identity_a = g.generator_ab(given.b)[0], g.generator_ba(given.a)[0]
    keys_a, queries_b = features("ab", given.a, fake_b, (g.generator_ab, g.generator_ba), (g.head_a, g.head_b))
    keys_b, queries_a = features("ba", given.b, fake_a, (g.generator_ba, g.generator_ab), (g.head_b, g.head_a))
    rows = (tuple(row) for row in (keys_a, keys_b, queries_a, queries_b))
    return Outputs(fake_a, fake_b, identity_a, identity_b, *rows)


def nce(queries: Any, keys: Any, whole_batch: bool = False) -> Tensor:
    """Cross-entropy of cosine similarities over 0.07, the diagonal among the negatives at -10; means of means."""
    layers = []
    for query, key in zip(queries, keys, strict=True):
        query, key = F.normalize(query, dim=2), F.normalize(key.detach(), dim=2)
        if whole_batch:
            query, key = query.flatten(0, 1)[None], key.flatten(0, 1)[None]
        rows = []
        for q, k in zip(query, key, strict=True):
            similar = q @ k.T
            logits = (
                torch.cat([similar.diag()[:, None], similar.masked_fill(torch.eye(len(q)).bool(), -10.0)], 1) / 0.07
            )
            rows.append(F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none"))
        layers.append(torch.cat(rows).mean())
    return torch.stack(layers).mean()


def official_generator_terms(method: Any, given: Batch, outputs: Outputs) -> dict[str, Tensor]:
    d = method.discriminator
    return {
        "gan_ab": 0.5 * F.relu(1 - d.critic_b(outputs.fake_b)).mean(),
        "gan_ba": 0.5 * F.relu(1 - d.critic_a(outputs.fake_a)).mean(),
        "nce_ab": 0.5 * 2 * nce(outputs.queries_b, outputs.keys_a),
        "nce_ba": 0.5 * 2 * nce(outputs.queries_a, outputs.keys_b),
        "identity_a": 0.5 * F.l1_loss(outputs.identity_a, given.a),
        "identity_b": 0.5 * F.l1_loss(outputs.identity_b, given.b),
    }


def gradients(module: torch.nn.Module, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, float(other[name].detach().abs().max()))
        assert float((one[name] - other[name]).detach().abs().max()) <= tolerance * scale, name


def flat(outputs: Outputs) -> dict[str, Tensor]:
    found = {}
    for field, value in outputs._asdict().items():
        found |= {f"{field}.{i}": x for i, x in enumerate(value)} if isinstance(value, tuple) else {field: value}
    return found


@pytest.mark.parametrize("images", [1, 2])
def test_shared_passes_give_what_separate_ones_give(images: int) -> None:
    method, given = build(), batch(images)
    ours, theirs = method.generator(given, DRAWS), separate(method, given)
    assert_same(flat(ours), flat(theirs), 1e-12)
    assert all(not key.requires_grad for key in (*ours.keys_a, *ours.keys_b))
    terms, official = (
        method.generator_loss(given, ours, method.discriminator, 0),
        official_generator_terms(method, given, theirs),
    )
    assert_same(terms, official)
    assert all(term.item() > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    mine, plain = gradients(method.generator, terms), gradients(method.generator, official)
    assert_same(mine, plain)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert sum(float(value.abs().max()) > 1e-6 for value in mine.values()) > len(mine) // 2


def test_critics_see_both_in_one_pass() -> None:
    method, given = build(), batch(2)
    fakes = method.generator(given, DRAWS, True)
    shown = Outputs(fakes.fake_a.detach(), fakes.fake_b.detach())
    d = method.discriminator
    official = {
        name: 0.5 * F.relu(1 - critic(real)).mean() + 0.5 * F.relu(1 + critic(fake)).mean()
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
    given, plain = batch(1), build()
    changed = build(lambda_gan=3.0, lambda_nce=5.0, lambda_identity=7.0, halved=False)
    terms = plain.generator_loss(given, plain.generator(given, DRAWS), plain.discriminator, 0)
    weighted = changed.generator_loss(given, changed.generator(given, DRAWS), changed.discriminator, 0)
    factors = {"gan": 2 * 3.0, "nce": 2 * 5.0 / 2.0, "identity": 2 * 7.0}
    assert_same(weighted, {name: factors[name.partition("_")[0]] * term for name, term in terms.items()})
    critics = changed.discriminator_loss(given, plain.generator(given, DRAWS, True), changed.discriminator, 0)
    assert_same(critics, plain.discriminator_loss(given, plain.generator(given, DRAWS, True), plain.discriminator, 0))


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


def test_every_parameter_is_in_one_group() -> None:
    method = build()
    groups = method.parameter_groups()
    assert set(groups) == set(SIDES)
    for side in SIDES:
        grouped = [id(p) for group in groups[side] for p in group.parameters]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in getattr(method, side).parameters()}
    heads = {id(p) for head in (method.generator.head_a, method.generator.head_b) for p in head.parameters()}
    for group in groups["generator"]:
        in_heads = {id(p) for p in group.parameters} == heads
        assert (group.lr, group.betas) == ((1e-3, (0.9, 0.999)) if in_heads else (2e-4, (0.5, 0.999)))
    assert [group.name for group in groups["generator"]] == ["generators", "heads"]


def test_the_critics_have_the_first_turn() -> None:
    expected = Turn("discriminator", "unpaired", True), Turn("generator", "unpaired", False)
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
