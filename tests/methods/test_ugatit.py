"""U-GAT-IT: batched passes give what a second reading gives in separate ones; attention, bounds, sizes, presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.method import SIDES, Attentive
from i2i_dist.methods import resolve
from i2i_dist.methods.ugatit import Outputs
from i2i_dist.networks.adalin_resnet import AttentiveGenerator
from i2i_dist.networks.attention_critic import AttentiveCritic, CriticInput
from i2i_dist.networks.critics import DomainPair
from i2i_dist.networks.spectral_norm import vectors
from i2i_dist.pool import ImagePools
from i2i_dist.step import update
from tests.methods import plain_networks, plain_ugatit
from tests.methods.cases.ugatit import SMALL
from tests.methods.plain_networks import assert_same, batch, gradients
from tests.methods.plain_side import plain_sides

DRAWS = Draws(seed=3, update_position=64)
FORMS = [(preset, light) for preset in ("official", "tensorflow") for light in (False, True)]


def build(**changes: Any) -> Any:
    """In fp64, with rho between its bounds and everything else of some size."""
    method = plain_networks.build({"name": "ugatit", **SMALL, **changes}, scale=3.0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in method.generator.named_parameters():
            if name.endswith("rho"):
                parameter.uniform_(0.0, 1.0, generator=draw)
    return method


def kept(module: torch.nn.Module) -> list[Tensor]:
    return [vector.clone() for vector in vectors(module)]


def put_back(module: torch.nn.Module, saved: list[Tensor]) -> None:
    for vector, value in zip(vectors(module), saved, strict=True):
        vector.copy_(value)


@pytest.mark.parametrize(("preset", "light"), FORMS)
def test_the_generators_terms_are_those_of_separate_passes(preset: str, light: bool) -> None:
    method, given = build(preset=preset, light=light), batch(2)
    began = kept(method.discriminator)
    terms = method.generator_loss(given, method.generator(given, DRAWS), method.discriminator, 0)
    ended = kept(method.discriminator)
    put_back(method.discriminator, began)
    official = plain_ugatit.generator_terms(method.generator, method.discriminator, given.a, given.b, method.config)
    assert_same(terms, official)
    assert all(term.item() > 1e-2 for term in terms.values()), "a term that is 0 compares with anything"
    assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(ended, vectors(method.discriminator), strict=True))
    assert not any(torch.allclose(*pair, atol=1e-6) for pair in zip(ended, began, strict=True) if len(pair[0]) > 1)
    mine, theirs = gradients(method.generator, terms), gradients(method.generator, official)
    assert_same(mine, theirs, 1e-9)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    assert sum(float(value.abs().max()) > 1e-6 for value in mine.values()) > len(mine) // 2


@pytest.mark.parametrize("preset", ["official", "tensorflow"])
def test_the_critics_see_real_and_fake_images_one_after_the_other(preset: str) -> None:
    method, given = build(preset=preset), batch(2)
    shown = Outputs(*(fake.detach() for fake in method.generator(given, DRAWS, True)[:2]))
    began = kept(method.discriminator)
    terms = method.discriminator_loss(given, shown, method.discriminator, 0)
    mine, ended = gradients(method.discriminator, terms), kept(method.discriminator)
    put_back(method.discriminator, began)
    official = plain_ugatit.critic_terms(
        method.discriminator,
        {"a": given.a, "b": given.b},
        {"a": shown.fake_a, "b": shown.fake_b},
        method.config,
    )
    assert_same(terms, official)
    assert_same(mine, gradients(method.discriminator, official))
    assert mine.keys() == {name for name, _ in method.discriminator.named_parameters()}
    assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(ended, vectors(method.discriminator), strict=True))


def asked(given: Batch, update_number: int, turn: Any, passes: int = 1) -> CriticInput:
    return CriticInput((DomainPair(given.a, given.b),) * passes, update_number, turn)


def test_every_micro_batch_of_a_turn_meets_the_same_weights() -> None:
    critics, given = build().discriminator, batch(2)
    halves = [Batch(*(part[half : half + 1] for part in given[:3]), 64) for half in (0, 1)]
    began = kept(critics)
    whole = critics(asked(given, 64, "discriminator", passes=2))
    ended = kept(critics)
    put_back(critics, began)
    parts = [critics(asked(half, 64, "other", passes=2)) for half in halves]
    for number, judged in enumerate(whole):
        for name, verdict in judged._asdict().items():
            together = [torch.cat(logits) for logits in zip(*(getattr(p[number], name) for p in parts), strict=True)]
            assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(verdict, together, strict=True))
    assert all(torch.equal(*pair) for pair in zip(ended, vectors(critics), strict=True))
    critics(asked(given, 64, "generator"))  # another turn goes on from there
    third = kept(critics)
    assert not all(torch.equal(*pair) for pair in zip(ended, third, strict=True))
    critics(asked(given, 68, "generator"))  # and so does another update
    assert not all(torch.equal(*pair) for pair in zip(third, vectors(critics), strict=True))


def test_in_eval_the_vectors_stay() -> None:
    critics, given = build().discriminator.eval(), batch(1)
    began = kept(critics)
    first, second = (critics(asked(given, number, "generator"))[0] for number in (0, 1))
    assert torch.equal(first.global_a.patches, second.global_a.patches)
    assert all(torch.equal(*pair) for pair in zip(began, vectors(critics), strict=True))


@pytest.mark.parametrize("preset", ["official", "tensorflow"])
def test_the_attention_learns_by_its_logits_and_by_the_weights_of_the_channels(preset: str) -> None:
    """In the generators; and in the critics, where the official code weighs channels by the raw weight."""
    method, given = build(preset=preset), batch(1)
    for network, call in (
        (method.generator.generator_ab, lambda net: (net(given.a).image, net(given.a).logits)),
        (method.discriminator.global_a, lambda net: net(given.a)),
    ):
        weight = network.cam.of_mean.weight
        map_made, logits = call(network)
        by_map = torch.autograd.grad(map_made.square().sum(), weight, retain_graph=True)[0]
        by_logits = torch.autograd.grad(logits.square().sum(), weight)[0]
        assert min(float(by_map.abs().max()), float(by_logits.abs().max())) > 1e-8

    # Twice the weight is, normalised, the same weight.
    critic = method.discriminator.global_a.eval()
    patches, cam = critic(given.a)
    with torch.no_grad():
        for classifier in {critic.cam.of_mean, critic.cam.of_max or critic.cam.of_mean}:
            classifier.weight.mul_(2.0)
    scaled_patches, scaled_cam = critic(given.a)
    assert torch.allclose(cam, scaled_cam, atol=1e-12)
    assert torch.allclose(patches, scaled_patches, atol=1e-12) == (preset == "tensorflow")


def test_rho_stays_in_its_bounds_through_updates_that_would_throw_it_out() -> None:
    method, given = build(lr=0.05), batch(2)
    rhos = [p for name, p in method.generator.named_parameters() if name.endswith("rho")]
    sides, reached = plain_sides(method), set()
    for number in range(6):
        pools = ImagePools((), 0, 0)
        update(method, sides, [given], pools, seed=3, number=number, images_seen=0)
        for rho in rhos:
            assert float(rho.detach().min()) >= 0 and float(rho.detach().max()) <= 1
            reached |= {bound for bound in (0.0, 1.0) if (rho == bound).any()}
    assert reached == {0.0, 1.0}


def test_rho_is_a_group_of_its_own_and_what_decays_follows_the_preset() -> None:
    for preset, decaying in (("official", {1, 2, 4}), ("tensorflow", {2, 4})):
        method = build(preset=preset, weight_decay=1e-4)
        groups = [group for side in method.parameter_groups().values() for group in side]
        assert {p.dim() for group in groups for p in group.parameters if group.weight_decay} == decaying
        assert {group.weight_decay for group in groups} <= {0.0, 1e-4}
        bounded = [group for group in groups if group.bounds]
        assert [(group.name, group.bounds) for group in bounded] == [("rho", (0.0, 1.0))]
        assert len(bounded[0].parameters) == 2 * 4  # two AdaLIN layers and two of ILN in each generator


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (16, 16), (8, 20)])
def test_one_set_of_weights_translates_any_size(light: bool, size: tuple[int, int]) -> None:
    method = build(light=light)
    assert isinstance(method, Attentive)
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    made = {}
    for direction in method.directions:
        translated = method.translate(image, direction)
        again, heat = method.attend(image, direction)
        network = getattr(method.generator, {"a_to_b": "generator_ab", "b_to_a": "generator_ba"}[direction])
        expected, _, expected_heat = plain_ugatit.generator(network, image, method.config)
        assert translated.shape == image.shape and heat.shape == (2, 1, size[0] // 4, size[1] // 4)
        assert torch.equal(again, translated)
        assert torch.allclose(translated, expected, atol=1e-10) and torch.allclose(heat, expected_heat, atol=1e-10)
        assert float(heat.detach().min()) >= 0 and float(heat.detach().std()) > 0
        alone = torch.cat([method.translate(one[None], direction) for one in image])
        assert torch.allclose(alone, translated, atol=1e-12)  # whatever else is in the batch
        made[direction] = translated
    assert not torch.allclose(made["a_to_b"], made["b_to_a"])


def test_at_its_own_size_a_full_generator_reads_every_place() -> None:
    """As the original does: moving one place of the attended map to another changes what is read."""
    style = build().generator.generator_ab.style
    x = torch.rand(1, 16, 4, 4, dtype=torch.float64)
    read = torch.nn.functional.linear(x.flatten(1), style.hidden1.weight).relu()
    read = torch.nn.functional.linear(read, style.hidden2.weight).relu()
    assert torch.equal(style(x)[0], torch.nn.functional.linear(read, style.to_gamma.weight))
    assert not torch.allclose(style(x)[0], style(x.flip(3))[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    method = build()
    with pytest.raises(ValueError, match=r"10 x 32; height and width must be multiples of 4"):
        method.translate(torch.zeros(1, 3, 10, 32, dtype=torch.float64), "a_to_b")
    critic = AttentiveCritic(width=2, layers=5)
    with pytest.raises(ValueError, match=r"23 x 40; with 5 layers they must be at least 24 x 24"):
        critic(torch.zeros(1, 3, 23, 40))
    assert critic(torch.zeros(1, 3, 24, 40)).patches.shape == (1, 1, 1, 3)


def test_networks_have_as_many_parameters_as_the_authors_code() -> None:
    with torch.device("meta"):
        networks = AttentiveGenerator(), AttentiveGenerator(light=True), AttentiveCritic(), AttentiveCritic(layers=5)
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [278_959_808, 10_589_888, 53_130_176, 3_290_560]


@pytest.mark.parametrize(("light", "parameters"), [(False, 670_761_088), (True, 134_021_248)])
def test_the_whole_method_has_as_many_parameters_as_the_authors_code(light: bool, parameters: int) -> None:
    method_class, config = resolve({"name": "ugatit", "light": light})
    with torch.device("meta"):
        method = method_class(config, torch.Generator("cpu"))
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == parameters


def test_initial_values() -> None:
    """PyTorch's default between -1 and 1 over the root of the fan-in, or N(0, 0.02) with biases 0; unit vectors."""
    for preset in ("official", "tensorflow"):
        method_class, config = resolve({"name": "ugatit", **SMALL, "width": 16, "preset": preset})
        torch.manual_seed(1)
        method, again = (method_class(config, torch.Generator().manual_seed(0)) for _ in range(2))
        for side in SIDES:
            state, other = getattr(method, side).state_dict(), getattr(again, side).state_dict()
            assert all(torch.equal(state[key], other[key]) for key in state)  # nothing comes from torch's own generator
            for name, p in state.items():
                owner, _, kind = name.rpartition(".")
                if kind in ("u", "v"):
                    assert abs(float(p.norm()) - 1) < 1e-6
                elif kind == "rho":
                    initial = 0.0 if ".up" in name else {"official": 0.9, "tensorflow": 1.0}[preset]
                    assert (p == initial).all()
                elif kind in ("gamma", "beta"):
                    assert (p == {"gamma": 1.0, "beta": 0.0}[kind]).all()
                elif preset == "official":
                    bound = state[f"{owner}.weight"][0].numel() ** -0.5
                    assert float(p.abs().max()) <= bound
                    assert p.numel() < 500 or abs(float(p.std()) * 3**0.5 / bound - 1) < 0.15
                elif kind == "bias":
                    assert not p.any()
                else:
                    assert p.numel() < 500 or abs(float(p.std()) / 0.02 - 1) < 0.15


def test_weights_stand_at_their_terms() -> None:
    given, one = batch(1), build()
    changed = build(lambda_gan=3.0, lambda_cycle=2.0, lambda_identity=5.0, lambda_cam=100.0)
    factors = {"gan": 3.0, "cycle": 0.2, "identity": 0.5, "cam": 10.0, "critic": 3.0}
    made = []
    for method in (one, changed):
        outputs = method.generator(given, DRAWS)
        shown = Outputs(outputs.fake_a.detach(), outputs.fake_b.detach())
        made.append(
            method.generator_loss(given, outputs, method.discriminator, 0)
            | method.discriminator_loss(given, shown, method.discriminator, 0)
        )
    assert_same(made[1], {name: factors[name.split("_")[0]] * term for name, term in made[0].items()})


def test_fakes_alone_are_the_same_fakes() -> None:
    method, given = build(), batch(2)
    alone, full = method.generator(given, DRAWS, True), method.generator(given, DRAWS)
    assert_same({"a": alone.fake_a, "b": alone.fake_b}, {"a": full.fake_a, "b": full.fake_b}, 1e-12)
    assert alone[2:] == (None,) * 8


def test_presets() -> None:
    official, tensorflow = (resolve({"name": "ugatit", "preset": p})[1] for p in ("official", "tensorflow"))
    assert official.model_dump() == {
        "name": "ugatit", "preset": "official", "width": 64, "blocks": 4, "light": False, "cam_grid": 64,
        "critic_width": 64, "global_layers": 7, "local_layers": 5, "bias": False, "affine": False, "cam_shared": False,
        "cam_normalised": False, "variance": "unbiased", "rho_smoothing": False, "init": "uniform", "decays": "all",
        "lambda_gan": 1.0, "lambda_cycle": 10.0, "lambda_identity": 10.0, "lambda_cam": 1000.0, "lr": 1e-4,
        "betas": (0.5, 0.999), "weight_decay": 1e-4,
    }  # fmt: skip
    assert tensorflow.model_dump() == official.model_dump() | {
        "preset": "tensorflow", "bias": True, "affine": True, "cam_shared": True, "cam_normalised": True,
        "variance": "biased", "rho_smoothing": True, "init": "normal", "decays": "kernels",
    }  # fmt: skip


def test_the_critics_have_the_first_turn() -> None:
    expected = "discriminator", "generator"
    assert all(build().turns(number) == expected for number in (0, 1, 17))
