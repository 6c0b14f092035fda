"""OP-GAN: its terms and gradients against a second reading, patch by patch; sizes; and maps that become trivial."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.engine_state import persistent_buffers
from i2i_dist.method import SIDES, Gauged
from i2i_dist.methods import resolve
from i2i_dist.methods.opgan import Outputs
from i2i_dist.networks.patch_content import SiameseNet, cut_pairs
from i2i_dist.pool import ImagePools
from i2i_dist.step import update
from tests.methods import plain_networks as plain
from tests.methods import plain_siamese
from tests.methods.plain_networks import assert_same, batch, gradients
from tests.methods.plain_side import plain_sides

SMALL = {"width": 4, "blocks": 1, "critic_width": 4, "siamese_width": 2, "pool_size": 0}
DRAWS = Draws(seed=3, update_position=64)


def build(**changes: Any) -> Any:
    return plain.build({"name": "opgan", **SMALL, **changes}, scale=5.0)


def shown(method: Any, given: Batch) -> Outputs:
    """What the critics' turn gets."""
    made = method.generator(given, DRAWS, True)
    return Outputs(**{field: getattr(made, field).detach() for field in (*method.fakes, *method.shown)})


def both_directions(method: Any, given: Batch, fake_a: Tensor, fake_b: Tensor, rounds: int = 1) -> Any:
    siamese = method.discriminator.siamese
    cells = [plain_siamese.cells_of(DRAWS, way, given.positions, rounds) for way in ("ab", "ba")]
    return (
        plain_siamese.terms(siamese, given.a, fake_b, cells[0], 0),
        plain_siamese.terms(siamese, given.b, fake_a, cells[1], 1),
    )


def generator_terms(method: Any, given: Batch, rounds: int = 1) -> dict[str, Tensor]:
    """Every pass on its own."""
    g, d = method.generator, method.discriminator
    fake_b, fake_a = plain.strided_image(g.generator_ab, given.a), plain.strided_image(g.generator_ba, given.b)
    (content_ab, domain_ab, _), (content_ba, domain_ba, _) = both_directions(method, given, fake_a, fake_b, rounds)
    return {
        "gan_ab": (plain.strided_logits(d.critic_b, fake_b) - 1).square().mean(),
        "gan_ba": (plain.strided_logits(d.critic_a, fake_a) - 1).square().mean(),
        "cycle_a": 10 * F.l1_loss(plain.strided_image(g.generator_ba, fake_b), given.a),
        "cycle_b": 10 * F.l1_loss(plain.strided_image(g.generator_ab, fake_a), given.b),
        "content_ab": content_ab, "content_ba": content_ba, "domain_ab": domain_ab, "domain_ba": domain_ba,
    }  # fmt: skip


def critic_terms(method: Any, given: Batch, outputs: Outputs, rounds: int = 1) -> dict[str, Tensor]:
    d, (ab, ba) = method.discriminator, both_directions(method, given, *outputs[2:4], rounds)
    critics = {
        name: 0.5
        * (
            (plain.strided_logits(critic, real) - 1).square().mean()
            + plain.strided_logits(critic, fake).square().mean()
        )
        for name, critic, real, fake in (
            ("critic_a", d.critic_a, given.a, outputs.fake_a),
            ("critic_b", d.critic_b, given.b, outputs.fake_b),
        )
    }
    return critics | {
        "siamese_content": ab[0] + ba[0], "siamese_spread": (ab[2] + ba[2]) / 2, "siamese_domain": ab[1] + ba[1],
    }  # fmt: skip


@pytest.mark.parametrize(("images", "pairs"), [(1, 4), (2, 4), (2, 8)])
def test_terms_and_gradients_are_those_of_a_second_reading(images: int, pairs: int) -> None:
    method, given = build(pairs_per_image=pairs), batch(images)
    outputs = method.generator(given, DRAWS)
    terms = method.generator_loss(given, outputs, method.discriminator, 0)
    official = generator_terms(method, given, pairs // 4)
    assert_same(terms, official)
    assert all(term.item() > 1e-3 for term in terms.values()), "a term that is 0 compares with anything"
    mine, theirs = gradients(method.generator, terms), gradients(method.generator, official)
    assert_same(mine, theirs)
    assert mine.keys() == {name for name, _ in method.generator.named_parameters()}

    outputs = shown(method, given)._replace(fake_a=given.b.flip(3), fake_b=given.a.flip(3))  # out of a pool
    terms = method.discriminator_loss(given, outputs, method.discriminator, 0)
    official = critic_terms(method, given, outputs, pairs // 4)
    assert_same(terms, official)
    assert all(term.item() > 1e-3 for term in terms.values())
    mine, theirs = gradients(method.discriminator, terms), gradients(method.discriminator, official)
    assert_same(mine, theirs)
    assert mine.keys() == {name for name, _ in method.discriminator.named_parameters()}


def test_weights_stand_at_their_terms() -> None:
    given, one = batch(1), build()
    weights = {"lambda_gan": 3.0, "lambda_cycle": 5.0, "lambda_content": 7.0, "lambda_domain": 11.0}
    changed = build(**weights, content_spread=0.3)
    terms = one.generator_loss(given, one.generator(given, DRAWS), one.discriminator, 0)
    weighted = changed.generator_loss(given, changed.generator(given, DRAWS), changed.discriminator, 0)
    assert_same(weighted, {name: {"g": 3, "cy": 0.5, "co": 7, "d": 11}[key] * terms[name] for name, key in NAMES})
    outputs = shown(one, given)
    terms = one.discriminator_loss(given, outputs, one.discriminator, 0)
    weighted = changed.discriminator_loss(given, outputs, changed.discriminator, 0)
    assert_same(
        weighted,
        {
            "critic_a": terms["critic_a"], "critic_b": terms["critic_b"],
            "siamese_content": 7 * terms["siamese_content"], "siamese_domain": 11 * terms["siamese_domain"],
            "siamese_spread": 7 * (terms["siamese_spread"] + 0.1),
        },
    )  # fmt: skip


NAMES = [
    ("gan_ab", "g"), ("gan_ba", "g"), ("cycle_a", "cy"), ("cycle_b", "cy"),
    ("content_ab", "co"), ("content_ba", "co"), ("domain_ab", "d"), ("domain_ba", "d"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ who learns what


def test_in_the_generators_turn_pictures_are_constant_and_the_siamese_network_is_frozen() -> None:
    method, given, said = build(), batch(2), []
    sides = plain_sides(method)
    method.discriminator.siamese.register_forward_hook(lambda *call: said.append(call[2]))
    with sides["discriminator"].frozen() as judge:
        terms = method.generator_loss(given, method.generator(given, DRAWS), judge, 0)
    (compared,) = said
    assert not compared.source_maps.requires_grad and not compared.spreads.requires_grad
    assert compared.translated_maps.requires_grad and compared.domains.requires_grad
    for name in ("content_ab", "content_ba", "domain_ab", "domain_ba"):
        method.generator.zero_grad()
        terms[name].backward(retain_graph=True)
        moved = {
            key.split(".")[0] for key, p in method.generator.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert moved == {f"generator_{name[-2:]}"}
    assert all(parameter.grad is None for parameter in method.discriminator.parameters())


def test_in_the_critics_turn_the_generators_learn_nothing() -> None:
    method, given = build(), batch(1)
    terms = method.discriminator_loss(given, shown(method, given), method.discriminator, 0)
    assert gradients(method.discriminator, terms).keys() == {
        name for name, _ in method.discriminator.named_parameters()
    }
    assert all(parameter.grad is None for parameter in method.generator.parameters())


def test_the_siamese_network_sees_what_the_pictures_of_the_batch_became_and_the_critics_the_pool() -> None:
    method, seen = build(pool_size=2), []
    pools = ImagePools(method.fakes, method.pool_size, 3)
    sides, loss = plain_sides(method, 0.0), method.discriminator_loss

    def noted(given: Batch, outputs: Outputs, *rest: Any) -> Any:
        seen.append((outputs, method.generator(given, DRAWS, True)))
        return loss(given, outputs, *rest)

    method.discriminator_loss = noted
    draw = torch.Generator().manual_seed(1)
    for number in range(5):
        a, b = (torch.rand(2, 3, 32, 32, generator=draw, dtype=torch.float64) for _ in range(2))
        given = Batch(a, b, torch.arange(2) + 2 * number, 2 * number)
        update(method, sides, [given], pools, seed=3, number=number, images_seen=2 * number)
    for outputs, fresh in seen:
        assert torch.allclose(outputs.translated_a, fresh.fake_a, atol=1e-12)
        assert torch.allclose(outputs.translated_b, fresh.fake_b, atol=1e-12)
    for field in method.fakes:
        assert any(not torch.allclose(getattr(one, field), getattr(fresh, field)) for one, fresh in seen)


# --------------------------------------------------------------------------------------------------- patches and pairs


def located(height: int, width: int) -> Tensor:
    """An image whose pixels say where they are: channel 0 the row, channel 1 the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).double()[None]


@pytest.mark.parametrize(
    ("size", "cell", "corner"),
    [
        ((256, 256), (85, 85), (0, 0)),
        ((257, 257), (85, 85), (1, 1)),
        ((40, 65), (13, 21), (0, 1)),
        ((29, 27), (9, 9), (1, 0)),
    ],
)
def test_the_grid_lies_in_the_middle_and_cells_are_the_same_pixels_in_both(
    size: tuple[int, int], cell: tuple[int, int], corner: tuple[int, int]
) -> None:
    source, translated = located(*size), located(*size) + 1000
    for first in range(9):
        cells = (torch.arange(7) + first) % 9
        pairs = cut_pairs(source, translated, cells[None, None])
        assert pairs.source.shape == pairs.translated.shape == (1, 4, 3, *cell)
        corners = [(corner[0] + number // 3 * cell[0], corner[1] + number % 3 * cell[1]) for number in cells.tolist()]
        assert [tuple(p[:2, 0, 0].int().tolist()) for p in pairs.source[0]] == corners[:4]
        assert [tuple((p[:2, 0, 0] - 1000).int().tolist()) for p in pairs.translated[0]] == corners[3:]
        for number in range(4):
            assert torch.equal(pairs.source[0, number], plain_siamese.patch(source, int(cells[number]))[0])
        assert torch.equal(pairs.translated[0, 0] - 1000, pairs.source[0, 3]), "C1 is the same place in both"


def test_each_sample_has_its_own_cells_and_every_pair_is_as_likely() -> None:
    method, images = build(pairs_per_image=8), 1500
    positions = torch.arange(images) + 64
    given = Batch(*(torch.zeros(2, 1, 3, 1, 1).expand(2, images, 3, 1, 1)), positions, 64)
    for direction in ("ab", "ba"):
        cells = method.generator._cells(direction, given, DRAWS)
        assert (cells.shape, cells.dtype) == ((images, 2, 7), torch.int64)
        assert all(len(set(row)) == 7 for row in cells.flatten(0, 1).tolist())
        for first, second in ((0, 1), (5, 6), (2, 4)):  # D1, D2, C2: 72 ordered pairs of different cells
            counted = Counter(map(tuple, cells.flatten(0, 1)[:, [first, second]].tolist()))
            assert len(counted) == 72
            expected = 2 * images / 72
            assert sum((number - expected) ** 2 / expected for number in counted.values()) < 71 + 5 * math.sqrt(2 * 71)
        aligned = Counter(cells[:, :, 3].flatten().tolist())  # C1
        assert len(aligned) == 9
        assert sum((number - images * 2 / 9) ** 2 / (images * 2 / 9) for number in aligned.values()) < 8 + 5 * 4
    part = given._replace(a=given.a[700:800], positions=positions[700:800])
    assert torch.equal(method.generator._cells("ab", part, DRAWS), method.generator._cells("ab", given, DRAWS)[700:800])
    assert not torch.equal(method.generator._cells("ab", given, DRAWS), method.generator._cells("ba", given, DRAWS))


def test_one_of_each_situation_and_labels_by_domain() -> None:
    """A classifier that knows everything has no loss; whose pairs are of other domains has some."""
    method, given = build(), batch(2)
    outputs, asked = shown(method, given), method.discriminator
    for source, logits_ba in ((0, 1), (1, 0)):

        def judge(said: Any, source: int = source, other: int = logits_ba) -> Any:
            answer = asked(said)
            known = torch.tensor([[source, 1 - source, 2, 2]] * 2 + [[other, 1 - other, 2, 2]] * 2)
            sure = 50.0 * F.one_hot(known, 3).double()
            return answer._replace(compared=answer.compared._replace(domains=sure))

        wrong = method.discriminator_loss(given, outputs, judge, 0)["siamese_domain"]
        assert float(wrong) == pytest.approx(0.0 if source == 0 else 50.0, abs=1e-9)


@pytest.mark.parametrize("pairs", [0, 2, 6])
def test_pairs_come_in_fours(pairs: int) -> None:
    with pytest.raises(ValueError, match="pairs_per_image"):
        build(pairs_per_image=pairs)


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((256, 256), [(85, 85), (43, 43), (22, 22), (11, 11)]),
        ((128, 128), [(42, 42), (21, 21), (11, 11), (6, 6)]),
        ((64, 64), [(21, 21), (11, 11), (6, 6), (3, 3)]),
        ((32, 32), [(10, 10), (5, 5), (3, 3), (2, 2)]),
        ((28, 512), [(9, 170), (5, 85), (3, 43), (2, 22)]),
    ],
)
def test_sizes_of_the_siamese_network(size: tuple[int, int], sides: list[tuple[int, int]]) -> None:
    """At 256 x 256 the features are 11 x 11 x 512 exactly, at other sizes they are averaged to it."""
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        network, image = SiameseNet(), torch.empty(2, 3, *size)
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: output[0].shape}))
    cells = torch.arange(7, device="meta").expand(2, 3, 7)
    compared = network(cut_pairs(image, image, cells))
    made = [shapes[name] for name in ("stem", "halvings.0", "halvings.1", "halvings.2")]
    assert made == [(channels, *side) for channels, side in zip((64, 128, 256, 512), sides, strict=True)]
    assert shapes["content"] == shapes["domain"] == (512, 11, 11)
    assert compared.source_maps.shape == compared.translated_maps.shape == (6, 11, 11)
    assert (compared.domains.shape, compared.spreads.shape) == ((6, 4, 3), (6,))


def test_pictures_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 24 x 64, .* 8 x 21 pixels; .* least 27 x 27"):
        cut_pairs(torch.zeros(1, 3, 24, 64), torch.zeros(1, 3, 24, 64), torch.arange(7)[None, None])


def test_numbers_of_parameters() -> None:
    method_class, config = resolve({"name": "opgan"})
    with torch.device("meta"):
        method = method_class(config, torch.Generator("cpu"))
        alone = SiameseNet()
    assert sum(parameter.numel() for parameter in alone.parameters()) == 8_639_108
    assert sum(p.numel() for side in SIDES for p in getattr(method, side).parameters()) == 28_285_832 + 8_639_108


def test_presets_and_turns() -> None:
    config = resolve({"name": "opgan"})[1]
    assert config.model_dump() == {
        "name": "opgan", "preset": "reconstruction", "width": 64, "blocks": 9, "critic_width": 64, "siamese_width": 64,
        "pairs_per_image": 4, "lambda_gan": 1.0, "lambda_cycle": 10.0, "lambda_content": 1.0, "lambda_domain": 1.0,
        "content_spread": 0.2, "pool_size": 50, "lr": 2e-4, "betas": (0.5, 0.999),
    }  # fmt: skip
    method = build(lr=3e-4, betas=[0.4, 0.9])
    assert all(method.turns(number) == ("generator", "discriminator") for number in (0, 1, 17))
    groups = method.parameter_groups()
    assert all((group.lr, group.betas) == (3e-4, (0.4, 0.9)) for side in SIDES for group in groups[side])


# ------------------------------------------------------------------------------------------- the trivial solution


def spread_of(method: Any) -> tuple[float, float]:
    assert isinstance(method, Gauged)
    (name, gauge), *others = method.gauges().items()
    assert (name, others) == ("attention_spread", [])
    assert not gauge.value.requires_grad
    return float(gauge.value), gauge.lowest


def test_the_gauge_tells_of_maps_that_are_the_same_for_all_patches() -> None:
    """Whether they are flat, or have a pattern that no patch changes, which a spread over places would not see."""
    method, given = build(), batch(2)
    outputs, siamese = shown(method, given), method.discriminator.siamese
    method.discriminator_loss(given, outputs, method.discriminator, 0)
    value, lowest = spread_of(method)
    cells = [plain_siamese.cells_of(DRAWS, way, given.positions, 1) for way in ("ab", "ba")]
    expected = []
    for images, drawn in zip((given.a, given.b), cells, strict=True):
        for number, ((*four, _, _, _),) in enumerate(drawn):
            patches = [plain_siamese.patch(images[number : number + 1], cell) for cell in four]
            maps = torch.stack([plain_siamese.content_map(siamese, patch).detach() for patch in patches])
            expected.append(float(maps.std(0, correction=0).square().mean().add(1e-6).sqrt()))
    assert value == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert value > lowest

    same = given._replace(a=torch.zeros_like(given.a), b=torch.zeros_like(given.b))  # patches without any content
    method.discriminator_loss(same, outputs, method.discriminator, 0)
    assert spread_of(method)[0] < lowest
    with torch.no_grad():
        siamese.to_map.weight.zero_()
    method.discriminator_loss(given, outputs, method.discriminator, 0)
    assert spread_of(method)[0] < lowest
    terms = method.discriminator_loss(given, outputs, method.discriminator, 0)
    assert float(terms["siamese_content"].detach()) < 1e-12
    assert all(torch.isfinite(value).all() for value in gradients(method.discriminator, terms).values())


def test_the_gauge_is_no_part_of_the_state() -> None:
    method = build()
    assert persistent_buffers(method.discriminator) == {}
    assert [name for name, _ in method.discriminator.named_buffers()] == ["siamese.spread"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("floor", "stuck"), [(0.0, True), (0.2, False)])
def test_without_a_floor_the_maps_become_trivial(floor: float, stuck: bool, one_thread: None) -> None:
    """What is known of the paper is not enough: its minimum is one map for all patches."""
    section = {"name": "opgan", **SMALL, "siamese_width": 8, "content_spread": floor, "lr": 2e-3}
    method_class, config = resolve(section)
    method: Any = method_class(config, torch.Generator().manual_seed(0))
    draw, sides = torch.Generator().manual_seed(2), plain_sides(method)
    for number in range(40):
        a, b = (F.interpolate(torch.rand(2, 3, 8, 8, generator=draw) * 2 - 1, size=32) for _ in range(2))
        given = Batch(a, b, torch.arange(2) + 2 * number, 2 * number)
        update(method, sides, [given], ImagePools((), 0, 0), seed=0, number=number, images_seen=2 * number)
        if number == 0:
            value, lowest = spread_of(method)
            assert value > lowest
    value, lowest = spread_of(method)
    assert (value < lowest) == stuck
