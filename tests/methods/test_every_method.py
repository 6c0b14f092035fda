"""What every method has to do, whatever its paper says; each is asked by the small version in tests/methods/cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from i2i_dist.draws import Draws
from i2i_dist.engines import Precision, repeated_blocks
from i2i_dist.method import SIDES, Labelled
from i2i_dist.methods import METHODS, resolve
from i2i_dist.pool import ImagePools
from i2i_dist.renderings import Options
from i2i_dist.step import Step, update
from i2i_dist.translate import translate, translate_all
from tests.methods.cases import CASES
from tests.methods.cases.common import SEED, SIZE
from tests.methods.plain_side import plain_sides
from tests.updates import global_batch, in_fp32, part_of, small_method, whole_batch

PRESETS = [(name, preset) for name, method in METHODS.items() for preset in method.PRESETS]
WITH_BLOCKS = [name for name in CASES if repeated_blocks(small_method(name).generator)]
WIDTH, HEIGHT = 70, 45  # of a picture: multiples of nothing that a network halves


def one_update(method: Any, sides: Any, parts: int = 1) -> Step:
    """Make the first update in which both sides train."""
    number = next(number for number in range(10) if len(method.turns(number)) == 2)
    pools, size = ImagePools(method.fakes, method.pool_size, SEED), global_batch(method) // parts
    whole = in_fp32(whole_batch(method, number))
    batches = [part_of(whole, slice(part * size, (part + 1) * size)) for part in range(parts)]
    return update(method, sides, batches, pools, seed=SEED, number=number, images_seen=0)


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_every_method_has_a_case() -> None:
    assert CASES.keys() == METHODS.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    method = small_method(name)
    groups = method.parameter_groups()
    assert set(groups) == set(SIDES)
    for side in SIDES:
        grouped = [id(parameter) for group in groups[side] for parameter in group.parameters]
        assert sorted(grouped) == sorted(id(parameter) for parameter in getattr(method, side).parameters())
    names = [group.name for side in SIDES for group in groups[side]]
    assert len(names) == len(set(names)), "learning rates are logged by the names of their groups"


def recomputing(name: str, *, recomputed: bool, blocks: int = 2) -> Any:
    method = small_method(name, blocks=blocks)
    for repeated in repeated_blocks(method.generator):
        repeated.recomputed = recomputed
    return method


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_that_run_twice_give_the_same_bits(name: str, precision: Precision) -> None:
    weights = []
    for recomputed in (False, True):
        method = recomputing(name, recomputed=recomputed)
        one_update(method, plain_sides(method, precision=precision))
        weights.append(flat(method.generator))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_that_run_twice_keep_what_they_were_given_and_no_more(name: str) -> None:
    """Without it each keeps at least what its two convolutions and two norms read."""
    batch = in_fp32(whole_batch(small_method(name), 0))

    def kept(recomputed: bool, blocks: int) -> int:
        """Return the bytes that a pass of the generator keeps for its backward."""
        method, storages = recomputing(name, recomputed=recomputed, blocks=blocks), {}
        own = {p.untyped_storage().data_ptr() for p in method.generator.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = method.generator(batch, Draws(SEED, 0))
        assert outputs is not None
        return sum(storage.nbytes() for place, storage in storages.items() if place not in own)

    plain, again = (kept(recomputed, 5) - kept(recomputed, 2) for recomputed in (False, True))
    assert 0 < again <= plain / 4


def test_u_nets_have_no_blocks_to_run_twice() -> None:
    assert set(CASES) - set(WITH_BLOCKS) == {"bicyclegan", "pix2pix"}
    assert not any(repeated_blocks(small_method(name).discriminator) for name in CASES)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_makes_an_update(name: str, preset: str) -> None:
    small = {key: value for key, value in CASES[name].small.items() if key not in METHODS[name].PRESETS[preset]}
    method_class, config = resolve({"name": name, "preset": preset, **small})
    method = method_class(config, torch.Generator().manual_seed(0))
    before = {side: flat(getattr(method, side)) for side in SIDES}
    step = one_update(method, plain_sides(method))
    assert step.skipped == ()
    assert all(math.isfinite(loss) for loss in step.losses.values())
    for side in SIDES:
        after = flat(getattr(method, side))
        assert torch.isfinite(after).all()
        assert not torch.equal(after, before[side])


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    method = small_method(name)
    sides = plain_sides(method)
    for side in SIDES:
        sides[side].optimizer.zero_grad = lambda **_: None
    one_update(method, sides)
    for side in SIDES:
        for parameter_name, parameter in getattr(method, side).named_parameters():
            assert parameter.grad is not None, f"{side} {parameter_name}"
            # A norm takes away what a bias in front of it adds.
            assert parameter.grad.any() or parameter_name.endswith("bias"), f"{side} {parameter_name}"


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_critics_learn_from_detached_fakes_and_the_generators_from_their_own(name: str, parts: int) -> None:
    method = small_method(name)
    if method.couples_batch and parts > 1:
        parts = 1
    shown: dict[str, list[Any]] = {side: [] for side in SIDES}
    for side in SIDES:
        loss = getattr(method, f"{side}_loss")

        def noted(given: Any, outputs: Any, *rest: Any, side: str = side, loss: Any = loss) -> Any:
            shown[side].append(outputs)
            return loss(given, outputs, *rest)

        setattr(method, f"{side}_loss", noted)
    one_update(method, plain_sides(method), parts)
    assert method.fakes
    sources = 1 if isinstance(method, Labelled) else method.group  # samples for each picture that is translated
    for side in SIDES:
        assert len(shown[side]) == parts
        for outputs in shown[side]:
            for field in method.fakes:
                fake = getattr(outputs, field)
                assert fake.shape == (global_batch(method) // parts // sources, 3, SIZE, SIZE)
                assert fake.requires_grad == (side == "generator")
    for outputs in shown["discriminator"]:
        rest = {
            field: value for field, value in outputs._asdict().items() if field not in (*method.fakes, *method.shown)
        }
        assert rest == {field: outputs._field_defaults[field] for field in rest}


@pytest.mark.parametrize("name", CASES)
def test_pictures_of_any_size_are_translated_under_their_names(name: str, tmp_path: Path) -> None:
    method = small_method(name)
    names = [Path("one.png"), Path("deeper/two.png")]
    for number, picture in enumerate(names):
        path = tmp_path / "pictures" / picture
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (40, 90 * number, 200)).save(path)
    options, made = Options(), names
    if isinstance(method, Labelled):
        label = method.label_space.attributes[0]
        options = Options(labels=(f"{label}=1",))
        made = [picture.with_stem(f"{picture.stem}_{label}") for picture in names]
    assert method.directions
    for direction in method.directions:
        target = tmp_path / direction
        assert translate_all(method, tmp_path / "pictures", target, direction, options) == 0
        assert {path.relative_to(target) for path in target.rglob("*.png")} == set(made)
        for picture in made:
            with Image.open(target / picture) as translated:
                assert (translated.size, translated.mode) == ((WIDTH, HEIGHT), "RGB")


@pytest.mark.parametrize("name", CASES)
def test_translations_are_images_and_one_for_each_direction(name: str) -> None:
    method = small_method(name)
    image = torch.randint(256, (HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = [translate(method, image, direction) for direction in method.directions]
    for translated in made:
        assert (translated.shape, translated.dtype) == ((1, 3, HEIGHT, WIDTH), torch.float32)
        assert float(translated.abs().max()) <= 1
        assert float(translated.std()) > 0
    assert len(made) == 1 or not torch.allclose(*made)


@pytest.mark.parametrize("name", CASES)
def test_a_direction_that_the_method_lacks_is_refused(name: str) -> None:
    method, image = small_method(name), torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8)
    lacking: list[Any] = [way for way in ("a_to_b", "b_to_a", "a_to_a") if way not in method.directions]
    for direction in lacking:
        with pytest.raises(ValueError, match=f"'{direction}'.*{method.directions[0]}"):
            translate(method, image, direction)
