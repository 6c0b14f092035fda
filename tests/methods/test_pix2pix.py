"""pix2pix: losses and gradients against torch.nn.functional, dropout by position, and translations that stand alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist import assembly
from i2i_dist.config import ConfigError, RunConfig, validate
from i2i_dist.data.batch import Batch
from i2i_dist.distributed import rank_and_world
from i2i_dist.draws import Draws
from i2i_dist.engines import Layout
from i2i_dist.method import SIDES
from i2i_dist.methods import METHODS, resolve
from i2i_dist.methods.pix2pix import CriticInput, Outputs
from i2i_dist.translate import translate, translate_all
from tests.data.builders import write_folder
from tests.methods.plain_networks import gradients
from tests.networks import plain
from tests.ranks import run_ranks

SMALL = {"width": 2, "downs": 6, "critic_width": 4}  # the fewest halvings with a place for dropout
SEED, FIRST, SIZE, IMAGES = 3, 64, 64, 4
DRAWS = Draws(SEED, FIRST)


def build(**changes: Any) -> Any:
    """A small method in fp64, with weights large enough that nothing hides in rounding."""
    method_class, config = resolve({"name": "pix2pix", **SMALL, **changes})
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for side in (method.generator, method.discriminator):
            side.double()
            for parameter in side.parameters():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.mul_(5.0 if parameter.dim() > 1 else 1.0).add_(noise, alpha=0.05)
    return method


def batch(images: int = IMAGES) -> Batch:
    draw = torch.Generator().manual_seed(5)
    a, b = (torch.rand(images, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Batch(a, b.abs(), torch.arange(images) + FIRST, FIRST)


def share(whole: Batch, rank: int, world: int) -> Batch:
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    return Batch(whole.a[mine], whole.b[mine], whole.positions[mine], whole.update_position)


def plain_fake(method: Any, given: Batch) -> Tensor:
    keep = [DRAWS.kept("up0", given.positions, (16, 4, 4), method.config.dropout)] if method.config.dropout else []
    return plain.unet(method.generator.generator_ab, given.a, keep, method.config.dropout)


def bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def plain_terms(method: Any, given: Batch, fake: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' code's losses of the generator and of the critic."""
    critic = method.discriminator.critic_b
    generator = {"gan_ab": bce(plain.critic(critic, given.a, fake), 1.0), "l1_b": 100 * (fake - given.b).abs().mean()}
    real, shown = plain.critic(critic, given.a, given.b), plain.critic(critic, given.a, fake.detach())
    return generator, {"critic_b": 0.5 * (bce(shown, 0.0) + bce(real, 1.0))}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name in one:
        largest = float(other[name].detach().abs().max())
        assert largest > 0, f"{name} is 0, which compares with anything"
        assert float((one[name] - other[name]).detach().abs().max()) <= tolerance * max(largest, 1e-3), name


@pytest.mark.parametrize("dropout", [0.5, 0.2, 0.0])
def test_losses_and_gradients_are_those_of_the_official_code(dropout: float) -> None:
    method, given = build(dropout=dropout), batch()
    outputs, fake = method.generator(given, DRAWS), plain_fake(method, given)
    assert_same(outputs._asdict(), {"fake_b": fake})
    generator, critic = plain_terms(method, given, fake)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    assert_same(terms, generator)
    mine = gradients(method.generator, terms)
    assert_same(mine, gradients(method.generator, generator))
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}
    terms = method.discriminator_loss(given, Outputs(outputs.fake_b.detach()), method.discriminator, 0)
    assert_same(terms, critic)
    mine = gradients(method.discriminator, terms)
    assert_same(mine, gradients(method.discriminator, critic))
    assert mine.keys() == {name for name, _ in method.discriminator.named_parameters()}


def test_the_critic_never_normalises_real_and_fake_together() -> None:
    method, given = build(), batch()
    critic, fake = method.discriminator, given.a.flip(0)
    both = critic(CriticInput(given.a, fake, given.b))
    assert torch.equal(both.fake, critic(CriticInput(given.a, fake)).fake)
    assert critic(CriticInput(given.a, fake)).real is None
    assert not torch.allclose(both.fake, critic(CriticInput(given.b, fake)).fake, atol=1e-3), "A has a say"


def test_weights_stand_at_their_terms() -> None:
    given, official = batch(), build()
    terms = official.generator_loss(given, official.generator(given, DRAWS), official.discriminator, 0)
    changed = build(lambda_l1=7.0, adversarial="lsgan")
    weighted = changed.generator_loss(given, changed.generator(given, DRAWS), changed.discriminator, 0)
    logits = plain.critic(official.discriminator.critic_b, given.a, plain_fake(official, given))
    assert_same(weighted, {"gan_ab": (logits - 1).square().mean(), "l1_b": 0.07 * terms["l1_b"]})


def kept(method: Any, given: Batch) -> Tensor:
    """The masks of dropout that the generator's network is given."""
    seen: list[Tensor] = []
    handle = method.generator.generator_ab.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    method.generator(given, DRAWS)
    handle.remove()
    [mask] = seen
    return mask


def test_a_sample_keeps_its_dropout_however_the_batch_is_split() -> None:
    method, given = build(), batch()
    whole = kept(method, given)
    assert whole.shape == (IMAGES, 16, 4, 4)
    for world in (2, 4):
        parts = [kept(method, share(given, rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)
    assert len({mask.numpy().tobytes() for mask in whole}) == IMAGES
    assert torch.equal(method.generator(given, DRAWS, True).fake_b, method.generator(given, DRAWS).fake_b)


def two_ranks() -> dict[str, float]:
    """Run on every rank: with dropout, this rank's half of the batch against a plain pass over the whole."""
    rank, world = rank_and_world()
    method, whole = build(), batch()
    given = share(whole, rank, world)
    outputs = method.generator(given, DRAWS)
    terms = {
        "generator": method.generator_loss(given, outputs, method.discriminator, 0),
        "discriminator": method.discriminator_loss(given, Outputs(outputs.fake_b.detach()), method.discriminator, 0),
    }
    running = method.generator.generator_ab.up_norms[1].running_var.clone()
    fake = plain_fake(method, whole)
    mine = share(Batch(whole.a, fake, whole.positions, FIRST), rank, world).b
    found = {"fakes": float((outputs.fake_b - mine).detach().abs().max())}
    for side, expected in zip(("generator", "discriminator"), plain_terms(method, whole, fake), strict=True):
        module, theirs = getattr(method, side), {}
        ours = gradients(module, terms[side])
        theirs = gradients(module, expected)
        for name, gradient in ours.items():
            torch.distributed.all_reduce(gradient)
            scale = max(float(theirs[name].abs().max()), 1e-3)
            found[f"{side}/{name}"] = float((gradient / world - theirs[name]).abs().max()) / scale
    spread = [torch.empty_like(running) for _ in range(world)]
    torch.distributed.all_gather(spread, running)
    found["running statistics"] = float((spread[0] - spread[1]).abs().max())
    return found


def test_two_ranks_equal_a_plain_pass_with_dropout(tmp_path: Path) -> None:
    for found in run_ranks(2, "tests.methods.test_pix2pix:two_ranks", tmp_path):
        assert len(found) > 30
        assert {name: distance for name, distance in found.items() if distance > 1e-9} == {}


@pytest.mark.parametrize("statistics", ["image", "running"])
def test_a_translation_does_not_depend_on_its_batch(statistics: str) -> None:
    method, image = build(translation_statistics=statistics), batch().a
    method.generator(batch(), DRAWS)  # gathers statistics
    buffers = {name: buffer.clone() for name, buffer in method.generator.named_buffers()}
    together = method.translate(image, "a_to_b")
    assert together.shape == image.shape and float(together.detach().abs().max()) <= 1
    for alone, one in zip(together, image, strict=True):
        assert torch.allclose(alone, method.translate(one[None], "a_to_b")[0], atol=1e-12)
    method.generator.eval()
    assert torch.equal(method.translate(image, "a_to_b"), together)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in method.generator.named_buffers())
    other = build(translation_statistics="running" if statistics == "image" else "image")
    assert not torch.allclose(other.translate(image, "a_to_b"), together, atol=1e-3)


def test_dropout_stays_on_in_translations() -> None:
    image = batch(1).a
    keep = [Draws(0, 0).kept("up0", torch.zeros(1, dtype=torch.int64), (16, 4, 4), 0.5)]
    expected = plain.unet(build().generator.generator_ab, image, keep, 0.5)
    assert torch.allclose(build().translate(image, "a_to_b"), expected, atol=1e-10)
    assert not torch.allclose(build(dropout=0.0).translate(image, "a_to_b"), expected, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 150), (65, 9)])
def test_pictures_of_any_size(height: int, width: int) -> None:
    method = build()
    method.generator.float()
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert method.multiple == 64
    assert translate(method, pixels, "a_to_b").shape == (1, 3, height, width)


def test_there_is_no_way_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given 'b_to_a', but this checkpoint's method translates a_to_b only"):
        translate_all(build(), tmp_path, tmp_path / "out", "b_to_a")


def run_config(**data: int) -> RunConfig:
    return validate(RunConfig, {"method": {}, "data": {"root": "x", **data}})


def test_several_micro_batches_are_refused() -> None:
    """Each would be normalised by itself, and the fakes of an update be made twice."""
    method = build()
    assert method.couples_batch
    config = run_config(crop_size=64)
    assembly._check_fits(config, method, Layout(4, 1, 2))
    with pytest.raises(ConfigError, match=r"train.micro_batch: given 2, .* depends on the whole global batch"):
        assembly._check_fits(config, method, Layout(2, 2, 2))


@pytest.mark.parametrize(
    ("crop", "load", "advice"),
    [
        (96, 96, "--set data.crop_size=64, or fewer halvings"),
        (32, 40, "--set data.crop_size=64 --set data.load_size=64, or fewer halvings: --set method.downs=N"),
    ],
)
def test_crops_that_cannot_be_halved_are_refused(crop: int, load: int, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assembly._check_multiple(run_config(crop_size=crop, load_size=load), build().multiple)
    assert f"data.crop_size: given {crop}, allowed" in str(caught.value) and advice in str(caught.value)


def test_folders_without_pairs_are_refused_before_training(tmp_path: Path) -> None:
    for side, number in (("A", 3), ("B", 2)):
        write_folder(tmp_path / f"train{side}", number)
    assert set(assembly._open(tmp_path, ["unpaired"])) == {"a", "b"}
    with pytest.raises(ConfigError, match="only in trainA: 002"):
        assembly._open(tmp_path, ["paired"])


def test_preset() -> None:
    [preset] = METHODS["pix2pix"].PRESETS
    assert resolve({"name": "pix2pix", "preset": preset})[1].model_dump() == {
        "name": "pix2pix", "preset": "official", "width": 64, "downs": 8, "critic_width": 64, "dropout": 0.5,
        "adversarial": "vanilla", "lambda_l1": 100.0, "translation_statistics": "image", "lr": 2e-4,
        "betas": (0.5, 0.999),
    }  # fmt: skip


def test_the_whole_method_has_as_many_parameters_as_the_official_code() -> None:
    method_class, config = resolve({"name": "pix2pix"})
    with torch.device("meta"):
        method: Any = method_class(config, torch.Generator("cpu"))
        judged = method.discriminator(CriticInput(*(torch.empty(1, 3, 256, 256) for _ in range(3))))
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == 57_182_660
    assert judged.fake.shape == judged.real.shape == (1, 1, 30, 30)
    assert method.multiple == 256


def test_weights_start_as_in_the_official_code() -> None:
    method_class, config = resolve({"name": "pix2pix", "width": 16, "critic_width": 16})
    method = method_class(config, torch.Generator().manual_seed(0))
    for side in SIDES:
        tensors: dict[str, list[Tensor]] = {"weights": [], "norms": [], "biases": []}
        for name, parameter in getattr(method, side).named_parameters():
            kind = "biases" if name.endswith("bias") else "weights" if parameter.dim() > 1 else "norms"
            tensors[kind].append(parameter.detach().flatten())
        weights, norms, biases = (torch.cat(tensors[kind]) for kind in ("weights", "norms", "biases"))
        assert float(weights.std()) == pytest.approx(0.02, rel=0.02) and abs(float(weights.mean())) < 1e-3
        assert float(norms.std()) == pytest.approx(0.02, rel=0.2) and float(norms.mean()) == pytest.approx(1, abs=5e-3)
        assert not biases.any()


def test_all_parameters_have_the_rate_of_the_configuration() -> None:
    groups = build(lr=3e-4, betas=[0.4, 0.9]).parameter_groups()
    assert all((group.lr, group.betas) == (3e-4, (0.4, 0.9)) for side in SIDES for group in groups[side])


def test_the_critic_has_the_first_turn() -> None:
    expected = "discriminator", "generator"
    method = build()
    assert all(method.turns(number) == expected for number in (0, 1, 17))
    assert method.fakes == ("fake_b",) and method.pool_size == 0 and method.directions == ("a_to_b",)
