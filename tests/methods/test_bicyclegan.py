"""BicycleGAN and its relatives: losses and gradients against torch.nn.functional, pairs, codes, and who learns what."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist import assembly
from i2i_dist.config import ConfigError, RunConfig, validate
from i2i_dist.data.batch import Batch
from i2i_dist.distributed import rank_and_world
from i2i_dist.draws import Draws
from i2i_dist.engines import Layout, Precision, SideEngine
from i2i_dist.method import SIDES, Styled
from i2i_dist.methods import METHODS, resolve
from i2i_dist.methods.bicyclegan import CODES
from i2i_dist.pool import ImagePools
from i2i_dist.step import update
from i2i_dist.translate import translate
from tests.methods.cases import CASES
from tests.networks import plain_styled as plain
from tests.ranks import run_ranks
from tests.test_engines import whole
from tests.updates import ExactForward, small_method

# The fewest halvings with a place for dropout.
SMALL = {"width": 2, "downs": 6, "encoder_width": 4, "encoder_blocks": 3, "critic_width": 4, "critic_layers": 2}
SEED, FIRST, SIZE, IMAGES = 3, 64, 64, 4
DRAWS = Draws(SEED, FIRST)
MODELS = list(CODES)
TERMS = {
    "bicyclegan": ["gan_encoded", "gan_random", "l1_b", "kl", "latent"],
    "cvae_gan": ["gan_encoded", "l1_b", "kl"],
    "clr_gan": ["gan_random", "latent"],
    "pix2pix_noise": ["gan_random", "l1_b"],
}


def build(model: str = "bicyclegan", **changes: Any) -> Any:
    """A small method in fp64, with weights large enough that nothing hides in rounding."""
    method_class, config = resolve({"name": "bicyclegan", "model": model, **SMALL, **changes})
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for side in (method.generator, method.discriminator):
            for parameter in side.double().parameters():
                spread = 1 / math.sqrt(max(1, parameter[0].numel()))
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.copy_(noise * (spread if parameter.dim() > 1 else 0.1))
    return method


def batch(images: int = IMAGES, size: int = SIZE) -> Batch:
    draw = torch.Generator().manual_seed(5)
    a, b = (torch.rand(images, 3, size, size, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Batch(a, b.abs(), torch.arange(images) + FIRST, FIRST)


def part(given: Batch, number: int, parts: int) -> Batch:
    mine = slice(number * len(given.a) // parts, (number + 1) * len(given.a) // parts)
    return Batch(given.a[mine], given.b[mine], given.positions[mine], given.update_position)


def squares(logits: list[Tensor], target: float) -> Tensor:
    return torch.stack([(scale - target).square().mean() for scale in logits]).sum()


def reading(method: Any, given: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The fakes, and the official losses of the generator's side and of the critics; every pass on its own."""
    config, fakes, losses, critics = method.config, {}, {}, {}
    g, e, model = method.generator.generator_ab, method.generator.encoder, method.config.model
    a, b, positions = given.a, given.b, given.positions
    real_a, real_b = a, b
    if model == "bicyclegan":
        a, b, positions, real_a, real_b = a[::2], b[::2], positions[::2], a[1::2], b[1::2]

    def translated(code: Tensor, name: str) -> Tensor:
        keep = [DRAWS.kept(f"{name}.up0", positions, (16, 4, 4), config.dropout)] if config.dropout else []
        return plain.unet(g, a, code, keep, config.dropout)

    def judged(name: str, source: Tensor, image: Tensor) -> list[Tensor]:
        shown = torch.cat([source, image], 1) if config.conditional_critic else image
        return plain.critic(getattr(method.discriminator, f"critic_{name}"), shown)

    if model in ("bicyclegan", "cvae_gan"):
        mean, logvar = plain.encode(e, b)
        assert logvar is not None
        noise = DRAWS.normal("encoded", positions, config.style_dim).double()
        fake = fakes["encoded"] = translated(mean + noise * logvar.exp().sqrt(), "encoded")
        losses["gan_encoded"] = squares(judged("encoded", a, fake), 1.0)
        losses["l1_b"] = 10 * (fake - b).abs().mean()
        losses["kl"] = 0.01 * (-0.5) * (1 + logvar - mean**2 - logvar.exp()).sum() / len(b)
        critics["critic_encoded"] = squares(judged("encoded", a, fake.detach()), 0.0)
        critics["critic_encoded"] = critics["critic_encoded"] + squares(judged("encoded", a, b), 1.0)
    if model != "cvae_gan":
        code = DRAWS.normal("random", positions, config.style_dim).double()
        fake = fakes["random"] = translated(code, "random")
        losses["gan_random"] = squares(judged("random", a, fake), 1.0)
        if model == "pix2pix_noise":
            losses["l1_b"] = 10 * (fake - b).abs().mean()
        else:
            losses["latent"] = 0.5 * (plain.encode(e, fake)[0] - code).abs().mean()
        critics["critic_random"] = squares(judged("random", a, fake.detach()), 0.0)
        critics["critic_random"] = critics["critic_random"] + squares(judged("random", real_a, real_b), 1.0)
    return fakes, losses, critics


def gradients(module: torch.nn.Module, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def official_gradients(method: Any, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two backwards, for the second of which BicycleGAN's encoder is switched off."""
    side, latent = method.generator, terms.pop("latent", None)
    side.zero_grad()
    torch.stack(list(terms.values())).sum().backward(retain_graph=True)
    if latent is not None:
        side.encoder.requires_grad_(method.config.model != "bicyclegan")
        latent.backward()
        side.encoder.requires_grad_(True)
    return {name: p.grad.clone() for name, p in side.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name in one:
        largest = float(other[name].detach().abs().max())
        assert largest > 0, f"{name} is 0, which compares with anything"
        assert float((one[name] - other[name]).detach().abs().max()) <= tolerance * max(largest, 1e-3), name


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.0}, {"conditional_critic": True}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_are_those_of_the_official_code(model: str, changes: dict[str, Any]) -> None:
    method, given = build(model, **changes), batch()
    outputs = method.generator(given, DRAWS)
    fakes, losses, critics = reading(method, given)
    assert_same({code: getattr(outputs, f"fake_{code}") for code in CODES[model]}, fakes)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert sorted(terms) == sorted(TERMS[model])
    assert_same(terms, losses)
    mine = gradients(method.generator, terms)
    assert_same(mine, official_gradients(method, losses))
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    shown = type(outputs)(**{field: getattr(outputs, field).detach() for field in method.fakes})
    terms = method.discriminator_loss(given, shown, method.discriminator, 0)
    assert_same(terms, critics)
    mine = gradients(method.discriminator, terms)
    assert_same(mine, gradients(method.discriminator, critics))
    assert mine.keys() == {name for name, _ in method.discriminator.named_parameters()}


def test_each_term_reaches_whom_it_should() -> None:
    method, given = build(), batch()
    terms = method.generator_loss(given, method.generator(given, DRAWS), method.discriminator, 0)
    reached = {}
    for name, term in terms.items():
        method.generator.zero_grad()
        term.backward(retain_graph=True)
        # Both codes go through one pass, so that the encoder may be handed zeros; they must be exactly that.
        reached[name] = {
            child
            for child, network in method.generator.named_children()
            if any(p.grad is not None and p.grad.any() for p in network.parameters())
        }
    both = {"generator_ab", "encoder"}
    expected = {"gan_encoded": both, "gan_random": {"generator_ab"}, "l1_b": both, "kl": {"encoder"}}
    assert reached == {**expected, "latent": {"generator_ab"}}
    assert all(parameter.requires_grad for parameter in method.generator.parameters())


def test_an_encoder_that_fails_while_it_is_frozen_can_be_trained_afterwards() -> None:
    method = build()
    calls: list[Tensor] = []

    def second_call_fails(_: Any, inputs: tuple[Tensor]) -> None:
        calls.append(*inputs)
        if len(calls) == 2:
            assert not any(parameter.requires_grad for parameter in method.generator.encoder.parameters())
            raise RuntimeError("out of memory")

    method.generator.encoder.register_forward_pre_hook(second_call_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        method.generator(batch(), DRAWS)
    assert all(parameter.requires_grad for parameter in method.generator.encoder.parameters())


def test_weights_stand_at_their_terms() -> None:
    given, official = batch(), build()
    terms = official.generator_loss(given, official.generator(given, DRAWS), official.discriminator, 0)
    weights = {"lambda_gan": 3.0, "lambda_gan_random": 5.0, "lambda_l1": 7.0, "lambda_kl": 11.0, "lambda_latent": 13.0}
    changed = build(**weights)
    weighted = changed.generator_loss(given, changed.generator(given, DRAWS), changed.discriminator, 0)
    factors = {"gan_encoded": 3.0, "gan_random": 5.0, "l1_b": 0.7, "kl": 1100.0, "latent": 26.0}
    assert_same(weighted, {name: factors[name] * term for name, term in terms.items()})


@pytest.mark.parametrize("model", MODELS)
def test_a_picture_is_made_from_the_same_draws_however_the_batch_is_split(model: str) -> None:
    method, given = build(model), batch(8)
    together = method.generator(given, DRAWS)
    for parts in (2, 4):  # of whole pairs
        apart = [method.generator(part(given, number, parts), DRAWS) for number in range(parts)]
        for field, value in together._asdict().items():
            if value is not None:
                pieces = torch.cat([getattr(outputs, field) for outputs in apart])
                assert len(value) == 8 // method.group and torch.allclose(pieces, value, atol=1e-12), field
    for field in method.fakes:
        made = getattr(method.generator(given, DRAWS, True), field)
        assert torch.equal(made, getattr(together, field))


def test_both_ways_start_at_the_first_of_a_pair_and_the_second_is_what_the_second_critic_sees_as_real() -> None:
    method, given = build(), batch()
    shown: list[dict[str, Tensor]] = []

    def judge(images: dict[str, Tensor]) -> Any:
        shown.append(images)
        return method.discriminator(images)

    outputs = method.generator(given, DRAWS)
    method.discriminator_loss(given, outputs, judge, 0)
    [images] = shown
    assert torch.equal(images["encoded"], torch.cat([given.b[0::2], outputs.fake_encoded]))
    assert torch.equal(images["random"], torch.cat([given.b[1::2], outputs.fake_random]))
    # What the second picture of a pair is changes nothing but that.
    other = Batch(given.a.clone(), given.b.clone(), given.positions, FIRST)
    other.a[1::2], other.b[1::2] = 0, 0
    for one, another in zip(outputs, method.generator(other, DRAWS), strict=True):
        assert torch.equal(one, another)


def test_the_two_passes_have_codes_and_dropout_of_their_own() -> None:
    method, given = build(), batch()
    seen: list[Any] = []
    handle = method.generator.generator_ab.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    outputs = method.generator(given, DRAWS)
    handle.remove()
    [(images, codes, [kept])] = seen  # one pass
    assert torch.equal(images, given.a[[0, 2, 0, 2]])
    assert len({code.numpy().tobytes() for code in codes.detach()}) == 4
    assert len({mask.numpy().tobytes() for mask in kept}) == 4
    assert torch.equal(codes[2:], outputs.code)
    later = method.generator(given._replace(positions=given.positions + 4), DRAWS)
    assert not torch.allclose(later.code, outputs.code, atol=0.1)


@pytest.mark.parametrize("model", ["bicyclegan", "cvae_gan"])
def test_kl_does_not_grow_with_the_batch(model: str) -> None:
    method, one = build(model), part(batch(), 0, 2)
    many = Batch(one.a.repeat(4, 1, 1, 1), one.b.repeat(4, 1, 1, 1), torch.arange(8), 0)
    kls = [
        method.generator_loss(given, method.generator(given, DRAWS), method.discriminator, 0)["kl"]
        for given in (one, many)
    ]
    torch.testing.assert_close(*kls)
    assert float(kls[0].detach()) > 0


# ------------------------------------------------------------------------------------------ translations and codes


@pytest.mark.parametrize("model", MODELS)
def test_a_translation_has_the_code_0_drops_nothing_and_stands_alone(model: str) -> None:
    method, image = build(model), batch().a
    together = method.translate(image, "a_to_b")
    zeros = torch.zeros(IMAGES, 8, dtype=torch.float64)
    assert torch.allclose(together, plain.unet(method.generator.generator_ab, image, zeros), atol=1e-10)
    for alone, one in zip(together, image, strict=True):
        assert torch.allclose(alone, method.translate(one[None], "a_to_b")[0], atol=1e-12)
    method.generator.eval()
    assert torch.equal(method.translate(image, "a_to_b"), together)


def test_a_code_is_a_style() -> None:
    method, image = build(), batch().a
    assert isinstance(method, Styled) and method.style_dim == 8
    codes = torch.randn(IMAGES, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    styled = method.translate_styled(image, codes)
    assert torch.equal(method.translate_styled(image, codes), styled)
    for place in range(IMAGES):
        alone = method.translate_styled(image[place : place + 1], codes[place : place + 1])
        assert torch.allclose(alone[0], styled[place], atol=1e-12)
    assert torch.equal(method.translate_styled(image, 0 * codes), method.translate(image, "a_to_b"))
    assert all(float((one - other).detach().abs().max()) > 0.01 for one, other in zip(
        method.translate_styled(image[:1].expand(IMAGES, -1, -1, -1), codes).roll(1, 0),
        method.translate_styled(image[:1].expand(IMAGES, -1, -1, -1), codes), strict=True,
    ))  # fmt: skip


def test_a_code_read_off_a_picture_is_its_mean_and_that_of_this_picture_alone() -> None:
    image = batch().b
    for model in MODELS:
        method = build(model)
        assert method.encodes == (model != "pix2pix_noise") == (method.generator.encoder is not None)
        if not method.encodes:
            with pytest.raises(ValueError, match="'pix2pix_noise' has no encoder; draw codes"):
                method.encode(image)
            continue
        codes = method.encode(image)
        assert torch.allclose(codes, plain.encode(method.generator.encoder, image)[0], atol=1e-12)
        for place in range(IMAGES):
            assert torch.allclose(method.encode(image[place : place + 1])[0], codes[place], atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 150), (65, 9)])
def test_pictures_of_any_size(height: int, width: int) -> None:
    method = build()
    method.generator.float()
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert method.multiple == 64
    assert translate(method, pixels, "a_to_b").shape == (1, 3, height, width)
    smallest = torch.zeros(1, 3, 64, 64)
    assert method.encode(smallest).shape == (1, 8)


# ------------------------------------------------------------------------------------------------- under engines


GRADIENT_MATRIX = [(m, stage) for m in MODELS for stage in (range(4) if m == "bicyclegan" else (0, 3))]
# In bf16, weights are cast once for several passes, and a frozen pass must not use what was cast for another.
ROUTES: list[tuple[str, int, Precision]] = [
    *((term, stage, "fp32") for term in ("lambda_latent", "lambda_gan_random") for stage in range(4)),
    *(("lambda_latent", stage, "bf16") for stage in (0, 3)),
]
WEIGHTS = ("lambda_gan", "lambda_gan_random", "lambda_l1", "lambda_kl", "lambda_latent")


def one_update(method: Any, stage: int, precision: Precision = "fp32", **options: Any) -> Any:
    """Return the engines after an update of 8 pictures in two micro-batches on each of two ranks: a pair in each."""
    rank, world = rank_and_world()
    layout = Layout(2, 2, world, stage=stage, precision=precision, persistence_threshold=0)
    sides: Any = {
        side: SideEngine(
            getattr(method, side), [group._replace(betas=(0.9, 0.999)) for group in groups], layout,
            torch.device("cpu"), **options,
        )
        for side, groups in method.parameter_groups().items()
    }  # fmt: skip
    mine = part(batch(8, 32), rank, world)
    batches, pools = [part(mine, number, 2) for number in range(2)], ImagePools((), 0, SEED)
    if precision == "bf16":
        batches = [given._replace(a=given.a.float(), b=given.b.float()) for given in batches]
    with ExactForward() if precision == "fp32" else contextlib.nullcontext():
        update(method, sides, batches, pools, seed=SEED, number=0, images_seen=0)
    return sides


def whole_batch_gradients(method: Any) -> dict[str, Tensor]:
    """Of a plain pass over all 8 pictures in this process."""
    given = batch(8, 32)
    with ExactForward():
        outputs = method.generator(given, DRAWS)
        terms = method.generator_loss(given, outputs, method.discriminator, 0)
        found = {f"generator/{n}": g for n, g in gradients(method.generator, terms).items()}
        shown = type(outputs)(**{field: getattr(outputs, field).detach() for field in method.fakes})
        terms = method.discriminator_loss(given, shown, method.discriminator, 0)
        return found | {f"discriminator/{n}": g for n, g in gradients(method.discriminator, terms).items()}


def engine_matrix() -> dict[str, Any]:
    """Run on every rank."""
    found: dict[str, Any] = {}
    expected = {model: whole_batch_gradients(small_method("bicyclegan", model=model)) for model in MODELS}
    for model, stage in GRADIENT_MATRIX:
        # Adam's first moment is then a tenth of the gradient.
        ours = whole(one_update(small_method("bicyclegan", model=model), stage), "exp_avg")
        assert ours.keys() == expected[model].keys()
        largest = max(float(gradient.abs().max()) for gradient in expected[model].values())
        worst = max(float((10 * ours[name] - expected[model][name]).abs().max()) for name in ours)
        found[f"{model} {stage}"] = worst / largest
    for term, stage, precision in ROUTES:
        method = small_method("bicyclegan", **{weight: float(weight == term) for weight in WEIGHTS})
        before = {name: parameter.detach().clone() for name, parameter in method.generator.named_parameters()}
        after = whole(one_update(method, stage, precision, optimizer=torch.optim.SGD, momentum=0.0), "param")
        moved = {name: float((after[f"generator/{name}"] - value).abs().max()) for name, value in before.items()}
        for network in ("generator_ab", "encoder"):
            found[f"{term} {stage} {precision} {network}"] = max(
                far for name, far in moved.items() if name.startswith(network)
            )
    return found


@pytest.fixture(scope="module")
def under_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = run_ranks(2, "tests.methods.test_bicyclegan:engine_matrix", tmp_path_factory.mktemp("ranks"))
    assert first == second, "the ranks disagree"
    assert isinstance(first, dict)
    return first


@pytest.mark.parametrize(("model", "stage"), GRADIENT_MATRIX)
def test_ranks_and_micro_batches_of_pairs_give_the_gradients_of_the_whole_batch(
    under_engines: dict[str, Any], model: str, stage: int
) -> None:
    assert under_engines[f"{model} {stage}"] <= 1e-6


@pytest.mark.parametrize(("term", "stage", "precision"), ROUTES)
def test_what_comes_from_the_drawn_code_moves_the_generator_and_never_the_encoder(
    under_engines: dict[str, Any], term: str, stage: int, precision: str
) -> None:
    assert under_engines[f"{term} {stage} {precision} encoder"] == 0.0
    assert under_engines[f"{term} {stage} {precision} generator_ab"] > 0


# ------------------------------------------------------------------------------------------------- what is stated


def test_preset() -> None:
    [preset] = METHODS["bicyclegan"].PRESETS
    assert resolve({"name": "bicyclegan", "preset": preset})[1].model_dump() == {
        "name": "bicyclegan", "preset": "official", "model": "bicyclegan", "style_dim": 8, "width": 64, "downs": 8,
        "dropout": 0.5, "encoder_width": 64, "encoder_blocks": 4, "critic_width": 64, "critic_layers": 3,
        "critic_scales": 2, "conditional_critic": False, "adversarial": "lsgan", "lambda_gan": 1.0,
        "lambda_gan_random": 1.0, "lambda_l1": 10.0, "lambda_kl": 0.01, "lambda_latent": 0.5, "lr": 2e-4,
        "betas": (0.5, 0.999),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("bicyclegan", {"generator_ab": 54_794_627, "encoder": 2_590_032, "critic_encoded": 3_458_978,
                        "critic_random": 3_458_978}),
        ("cvae_gan", {"generator_ab": 54_794_627, "encoder": 2_590_032, "critic_encoded": 3_458_978}),
        # Nothing would train the layer for the variance, which has 256 * 8 + 8.
        ("clr_gan", {"generator_ab": 54_794_627, "encoder": 2_587_976, "critic_random": 3_458_978}),
        ("pix2pix_noise", {"generator_ab": 54_794_627, "critic_random": 3_458_978}),
    ],
)  # fmt: skip
def test_a_model_has_the_networks_that_it_uses(model: str, parameters: dict[str, int]) -> None:
    method_class, config = resolve({"name": "bicyclegan", "model": model})
    with torch.device("meta"):
        method: Any = method_class(config, torch.Generator("cpu"))
    networks = [network for side in SIDES for network in getattr(method, side).named_children()]
    assert {name: sum(p.numel() for p in network.parameters()) for name, network in networks} == parameters
    groups = method.parameter_groups()
    assert [group.name for side in SIDES for group in groups[side]] == list(parameters)
    assert method.multiple == 256


def test_weights_start_as_in_the_official_code() -> None:
    method_class, config = resolve({"name": "bicyclegan", **CASES["bicyclegan"].small, "width": 32})
    method = method_class(config, torch.Generator().manual_seed(0))
    for side in SIDES:
        for layer in getattr(method, side).modules():
            if getattr(layer, "weight", None) is not None:
                fan = layer.weight[0].numel() + layer.weight.numel() // layer.weight.size(1)
                expected, size = 0.02 * math.sqrt(2 / fan), layer.weight.numel()
                assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=4 / math.sqrt(size))
                assert not layer.bias.any()


def test_all_parameters_have_the_rate_of_the_configuration() -> None:
    groups = build(lr=3e-4, betas=[0.4, 0.9]).parameter_groups()
    assert all((group.lr, group.betas) == (3e-4, (0.4, 0.9)) for side in SIDES for group in groups[side])


@pytest.mark.parametrize("model", MODELS)
def test_the_generator_has_the_first_turn(model: str) -> None:
    expected = "generator", "discriminator"
    method = build(model)
    assert all(method.turns(number) == expected for number in (0, 1, 17))
    assert method.fakes == tuple(f"fake_{code}" for code in CODES[model]) and method.pool_size == 0
    assert method.group == (2 if model == "bicyclegan" else 1)
    assert method.directions == ("a_to_b",) and not method.couples_batch


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="encoder_blocks: given 3, allowed is less than downs=3"):
        build(downs=3)
    assert build("pix2pix_noise", downs=3).multiple == 8
    config = validate(RunConfig, {"method": {}, "data": {"root": "x", "crop_size": 64, "load_size": 64}})
    assembly._check_fits(config, build(), Layout(2, 2, 2))
    assembly._check_fits(config, build("cvae_gan"), Layout(1, 2, 2))
    with pytest.raises(ConfigError, match=r"train\.global_batch: given 1, .* 2 consecutive .* train\.global_batch=2$"):
        assembly._check_fits(config, build(), Layout(1, 1, 1))
    tree = {"method": {}, "data": {"root": "x"}, "train": {"global_batch": 18, "micro_batch": 3}}
    with pytest.raises(
        ConfigError, match=r"micro_batch: given 3, .* train\.global_batch=24 --set train\.micro_batch=4"
    ):
        assembly._check_fits(validate(RunConfig, tree), build(), Layout(3, 3, 2))


@pytest.mark.parametrize("model", TERMS)
def test_a_weight_of_a_term_that_the_model_lacks_is_refused(model: str) -> None:
    """And every other weight is taken, and changes a loss."""
    weights = {
        "gan_encoded": "lambda_gan", "gan_random": "lambda_gan_random", "l1_b": "lambda_l1", "kl": "lambda_kl",
        "latent": "lambda_latent",
    }  # fmt: skip
    for term, key in weights.items():
        if term in TERMS[model]:
            assert getattr(build(model, **{key: 3.3}).config, key) == 3.3
        else:
            with pytest.raises(ConfigError, match=f"{key}: given 3.3, but the model {model} has no such term"):
                build(model, **{key: 3.3})
