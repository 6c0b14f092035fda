"""SimDCL: both presets are what a second reading of the released code and of the paper computes, at any batch size."""

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
from i2i_dist.methods.simdcl import Outputs
from i2i_dist.networks.critics import DomainPair
from i2i_dist.networks.siamese import MappingNet
from tests.methods import plain_networks as plain
from tests.methods.plain_networks import SIZE, assert_same, batch, gradients

SMALL = {
    "width": 4, "blocks": 2, "critic_width": 4, "head_dim": 16, "nce_patches": 24,
    "nce_layers": ["down1", "down2", "block2"],
}  # fmt: skip
LAYERS = ("down1", "down2", "block2")
MAPPINGS = ("mapping_real_a", "mapping_fake_a", "mapping_real_b", "mapping_fake_b")
DRAWS = Draws(seed=3, update_position=64)


def build(**changes: Any) -> Any:
    return plain.build({"name": "simdcl", **SMALL, **changes})


def mapped(network: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    """Each image's normalised rows, [P, D] of every layer, as one picture with a channel for each layer; [N, 64]."""
    p, vectors = dict(network.named_parameters()), []
    for image in zip(*rows, strict=True):
        x = F.conv2d(torch.stack(image)[None], p["conv.weight"], p["conv.bias"], stride=2, padding=0).relu()
        x = F.linear(x.flatten(2).mean(2), p["hidden.weight"], p["hidden.bias"]).relu()
        vectors.append(plain.normalised(F.linear(x, p["to_vector.weight"], p["to_vector.bias"])))
    return torch.cat(vectors)


def plain_terms(method: Any, given: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the generator's and the critics' terms, every pass on its own."""
    g, d = method.generator, method.discriminator
    half, nce_weight, components = {"official": (0.5, 1, 1), "paper": (1.0, 2, 64)}[method.config.preset]

    def rows(domain: str, purpose: str, image: Tensor) -> list[Tensor]:
        network, head = (g.generator_ab, g.head_a) if domain == "a" else (g.generator_ba, g.head_b)
        maps = plain.generator_maps(network, image)
        ids = [DRAWS.patch_ids(f"{purpose}.{layer}", math.prod(maps[layer].shape[2:]), 24) for layer in LAYERS]
        return [plain.head_rows(head, i, maps[layer], ids[i]) for i, layer in enumerate(LAYERS)]

    def nce(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        # The released code normalises a second time, by the cosine.
        pairs = [[F.normalize(x, dim=2) for x in pair] for pair in zip(queries, keys, strict=True)]
        return torch.stack([plain.nce(*pair) for pair in pairs]).mean()

    def ab(image: Tensor) -> Tensor:
        return plain.generator_maps(g.generator_ab, image)["image"]

    def ba(image: Tensor) -> Tensor:
        return plain.generator_maps(g.generator_ba, image)["image"]

    fake_b, fake_a = ab(given.a), ba(given.b)
    keys_a, keys_b = rows("a", "ab", given.a), rows("b", "ba", given.b)
    similarity = {
        "similarity_a": (mapped(g.mapping_real_a, keys_a), mapped(g.mapping_fake_a, rows("a", "similarity_a", fake_a))),
        "similarity_b": (mapped(g.mapping_real_b, keys_b), mapped(g.mapping_fake_b, rows("b", "similarity_b", fake_b))),
    }
    generator = {
        "gan_ab": half * (1 - plain.logits(d.critic_b, fake_b)).clamp(min=0).mean(),
        "gan_ba": half * (1 - plain.logits(d.critic_a, fake_a)).clamp(min=0).mean(),
        "nce_ab": half * nce_weight * nce(rows("b", "ab", fake_b), keys_a),
        "nce_ba": half * nce_weight * nce(rows("a", "ba", fake_a), keys_b),
        "identity_a": half * (ba(given.a) - given.a).abs().mean(),
        "identity_b": half * (ab(given.b) - given.b).abs().mean(),
    } | {name: 10 * components * (real - fake).abs().mean() for name, (real, fake) in similarity.items()}
    critics = {
        f"critic_{domain}": 0.5
        * (F.relu(1 - plain.logits(critic, real)).mean() + F.relu(1 + plain.logits(critic, fake.detach())).mean())
        for domain, critic, real, fake in (("a", d.critic_a, given.a, fake_a), ("b", d.critic_b, given.b, fake_b))
    }
    return generator, critics


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_losses_and_gradients_are_those_of_a_second_reading(preset: str, images: int) -> None:
    method, given = build(preset=preset), batch(images)
    generator, critics = plain_terms(method, given)
    outputs = method.generator(given, DRAWS)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert_same(terms, generator)
    assert all(term.item() > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    mine, theirs = gradients(method.generator, terms), gradients(method.generator, generator)
    assert_same(mine, theirs)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert sum(float(value.abs().max()) > 1e-6 for value in mine.values()) > len(mine) // 2

    shown = Outputs(outputs.fake_a.detach(), outputs.fake_b.detach())
    terms = method.discriminator_loss(given, shown, method.discriminator, 0)
    assert_same(terms, critics)
    assert_same(gradients(method.discriminator, terms), gradients(method.discriminator, critics))


def test_keys_get_their_gradient_from_the_similarity_alone() -> None:
    method, given = build(), batch(2)
    outputs = method.generator(given, DRAWS)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    keys = (*outputs.dual.keys_a, *outputs.dual.keys_b)
    contrast = torch.autograd.grad(terms["nce_ab"] + terms["nce_ba"], keys, allow_unused=True, retain_graph=True)
    assert contrast == (None,) * 6
    similar = torch.autograd.grad(terms["similarity_a"] + terms["similarity_b"], keys)
    assert all(float(gradient.abs().max()) > 1e-9 for gradient in similar)


def test_the_sum_over_the_components_is_64_means() -> None:
    given, mean, total = batch(2), build(), build(similarity_reduction="sum")
    outputs = mean.generator(given, DRAWS)
    one = mean.generator_loss(given, outputs, mean.discriminator, 0)
    other = total.generator_loss(given, outputs, total.discriminator, 0)
    for name in one:
        assert other[name].item() == (64 if name.startswith("similarity") else 1) * one[name].item()


def test_a_vector_belongs_to_one_image() -> None:
    """Two images are mapped as each of them alone; the pictures' order is the vectors' order."""
    network = MappingNet(3).double()
    rows = [torch.randn(2, 9, 7, dtype=torch.float64) for _ in range(3)]
    both = network(rows)
    assert both.shape == (2, 64)
    for image in range(2):
        assert torch.allclose(both[image], network([layer[image : image + 1] for layer in rows])[0], atol=1e-12)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    assert torch.allclose(both.norm(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-4)


def test_similarity_is_a_mean_over_the_images() -> None:
    method, given = build(), batch(2)
    apart = [Batch(given.a[i : i + 1], given.b[i : i + 1], given.positions[i : i + 1], 64) for i in range(2)]
    terms, *each = (
        method.generator_loss(one, method.generator(one, DRAWS), method.discriminator, 0) for one in (given, *apart)
    )
    for name in terms:  # and so is everything else, with negatives of the same image
        assert terms[name].item() == pytest.approx((each[0][name] + each[1][name]).item() / 2, rel=1e-9)


def test_translations_are_mapped_from_patches_of_their_own() -> None:
    """Drawn anew: neither those of the keys nor those of the other domain."""
    method, given, shown = build(), batch(1), {}
    for name in MAPPINGS:
        getattr(method.generator, name).register_forward_pre_hook(
            lambda _, inputs, name=name: shown.__setitem__(name, inputs[0])
        )
    outputs = method.generator(given, DRAWS)
    assert shown["mapping_real_a"] is outputs.dual.keys_a and shown["mapping_real_b"] is outputs.dual.keys_b
    for fake, queries in (("mapping_fake_a", outputs.dual.queries_a), ("mapping_fake_b", outputs.dual.queries_b)):
        for mine, query in zip(shown[fake], queries, strict=True):
            assert mine.shape == query.shape
            assert not torch.allclose(mine, query, atol=1e-6)


@pytest.mark.parametrize("negatives", ["image", "global_batch"])
def test_negatives(negatives: str) -> None:
    """Two images' patches are told apart within each image, or all from all. No process group: one rank."""
    method, given = build(negatives=negatives), batch(2)
    assert method.couples_batch == (negatives == "global_batch")
    outputs = method.generator(given, DRAWS)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    losses = {}
    for kind in ("image", "global_batch"):
        layers = []
        for query, key in zip(outputs.dual.queries_b, outputs.dual.keys_a, strict=True):
            rows = [F.normalize(x, dim=2) for x in (query, key)]
            layers.append(plain.nce(*(x if kind == "image" else x.flatten(0, 1)[None] for x in rows)))
        losses[kind] = 0.5 * torch.stack(layers).mean().item()
    assert terms["nce_ab"].item() == pytest.approx(losses[negatives], rel=1e-9)
    assert abs(losses["image"] - losses["global_batch"]) > 1e-2


def test_the_clamped_hinge_gives_no_gradient_beyond_1() -> None:
    method, given = build(), batch(1)
    fake = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    outputs = method.generator(given, DRAWS)
    outputs = outputs._replace(dual=outputs.dual._replace(fake_a=fake, fake_b=fake))

    def sure(images: DomainPair) -> DomainPair:
        return DomainPair(images.a.mean() + 2.0, images.b.mean() + 2.0)

    terms = method.generator_loss(given, outputs, sure, 0)
    (gradient,) = torch.autograd.grad(terms["gan_ab"] + terms["gan_ba"], fake)
    assert terms["gan_ab"].item() == 0.0
    assert not gradient.any()


def test_fakes_alone_are_the_same_fakes() -> None:
    method, given = build(), batch(2)
    alone, full = method.generator(given, DRAWS, True), method.generator(given, DRAWS)
    assert_same({"a": alone.fake_a, "b": alone.fake_b}, {"a": full.fake_a, "b": full.fake_b}, 1e-12)
    assert alone[2:] == (None, (), ())


def test_no_pass_is_made_twice() -> None:
    """Each generator: source and identity together, and the encoding of the other's translation."""
    method, images = build(), []
    for name in ("generator_ab", "generator_ba"):
        getattr(method.generator, name).register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    method.generator(batch(1), DRAWS)
    assert images == [2, 2, 1, 1]


def test_weights_stand_at_their_terms() -> None:
    given, one = batch(1), build()
    outputs = one.generator(given, DRAWS)
    terms = one.generator_loss(given, outputs, one.discriminator, 0)
    changed = build(lambda_gan=3.0, lambda_nce=5.0, lambda_identity=7.0, lambda_similarity=2.0, halved=False)
    weighted = changed.generator_loss(given, outputs, changed.discriminator, 0)
    factors = {"gan": 2 * 3.0, "nce": 2 * 5.0, "identity": 2 * 7.0, "similarity": 0.2}
    assert_same(weighted, {name: factors[name.partition("_")[0]] * term for name, term in terms.items()})


def test_presets() -> None:
    official, paper = (resolve({"name": "simdcl", "preset": p})[1].model_dump() for p in ("official", "paper"))
    assert official == {
        "name": "simdcl", "preset": "official", "width": 64, "blocks": 9, "critic_width": 64, "head_dim": 256,
        "nce_layers": ("down1", "down2", "block1", "block5"), "nce_patches": 256, "temperature": 0.07,
        "negatives": "image", "adversarial": "hinge", "lambda_gan": 1.0, "lambda_nce": 1.0, "lambda_identity": 1.0,
        "lambda_similarity": 10.0, "similarity_reduction": "mean", "halved": True, "pool_size": 0, "lr": 2e-4,
        "lr_heads": 2e-4, "betas": (0.5, 0.999), "betas_heads": (0.5, 0.999),
    }  # fmt: skip
    changed = {"lambda_nce": 2.0, "similarity_reduction": "sum", "halved": False, "pool_size": 50}
    assert paper == official | {"preset": "paper"} | changed


def test_the_whole_method_has_as_many_parameters_as_the_released_code() -> None:
    method_class, config = resolve({"name": "simdcl"})
    with torch.device("meta"):
        method: Any = method_class(config, torch.Generator("cpu"))
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == 29_315_720
    assert [sum(p.numel() for p in getattr(method.generator, m).parameters()) for m in MAPPINGS] == [10_688] * 4
    assert method.generator.mapping_real_a.conv(torch.empty(1, 4, 256, 256, device="meta")).shape == (1, 64, 127, 127)


def test_mapping_networks_start_small_and_stay_exact_under_autocast() -> None:
    method_class, config = resolve({"name": "simdcl", **SMALL})
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    for name in MAPPINGS:
        network = getattr(method.generator, name)
        for layer, fans in ((network.conv, 27 + 64 * 9), (network.hidden, 128), (network.to_vector, 128)):
            assert layer.weight.detach().std().item() == pytest.approx(0.02 * math.sqrt(2 / fans), rel=0.1)
            assert not layer.bias.any()
    rows = [torch.randn(2, 24, 16) for _ in LAYERS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = method.generator.mapping_real_a(rows)
    exact = method.generator.mapping_real_a.double()([layer.double() for layer in rows])
    assert vectors.dtype == torch.float32
    assert float((vectors - exact).detach().abs().max()) < 1e-5 * float(exact.detach().abs().max())


def test_heads_and_mapping_networks_have_a_rate_of_their_own() -> None:
    method = build(lr_heads=3e-4, betas_heads=[0.4, 0.9])
    groups = method.parameter_groups()
    generators, heads = groups["generator"]
    names = {id(p): name.partition(".")[0] for name, p in method.generator.named_parameters()}
    assert {names[id(p)] for p in generators.parameters} == {"generator_ab", "generator_ba"}
    assert {names[id(p)] for p in heads.parameters} == {"head_a", "head_b", *MAPPINGS}
    assert (generators.lr, generators.betas) == (2e-4, (0.5, 0.999))
    assert (heads.lr, heads.betas) == (3e-4, (0.4, 0.9))


def test_the_critics_have_the_first_turn() -> None:
    expected = "discriminator", "generator"
    assert all(build().turns(number) == expected for number in (0, 1, 17))


def test_translate_both_ways() -> None:
    method, image = build(), torch.rand(2, 3, 24, 40, dtype=torch.float64) * 2 - 1
    for direction, network in (("a_to_b", "generator_ab"), ("b_to_a", "generator_ba")):
        expected = plain.generator_maps(getattr(method.generator, network), image)["image"]
        assert torch.allclose(method.translate(image, direction), expected, atol=1e-12)


@pytest.mark.parametrize("key", ["nce_patches", "head_dim"])
def test_fewer_than_three_patches_or_dimensions_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key}: given 2, allowed is greater than or equal to 3"):
        resolve({"name": "simdcl", key: 2})
    smallest = build(**{key: 3})
    outputs = smallest.generator(batch(1), DRAWS)
    terms = smallest.generator_loss(batch(1), outputs, smallest.discriminator, 0)
    assert all(term.isfinite() for term in terms.values())


def test_a_layer_with_fewer_locations_than_patches_is_refused_with_advice() -> None:
    """32 pixels leave 8 x 8 locations in the blocks; where all layers have as few, they can be mapped."""
    with pytest.raises(ValueError, match=r"\[1, 100, 16\], \[1, 100, 16\], \[1, 64, 16\]; .* ask for fewer patches"):
        build(nce_patches=100).generator(batch(1), DRAWS)
    outputs = build(nce_patches=100, nce_layers=["block1", "block2"]).generator(batch(1), DRAWS)
    assert outputs.dual.keys_a[0].shape == (1, 64, 16)
