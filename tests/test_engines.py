"""Two ranks under DeepSpeed train what a plain PyTorch loop trains in one process, at every ZeRO stage."""

from __future__ import annotations

import itertools
import math
import socket
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist import assembly, engines, replicas
from i2i_dist.checkpoint import directory_name
from i2i_dist.config import ConfigError, DataConfig, RunConfig, TrainConfig
from i2i_dist.distributed import barrier, rank_and_world
from i2i_dist.engine_state import capture, persistent_buffers
from i2i_dist.engines import Layout, SideEngine, met_not_finite
from i2i_dist.method import SIDES, ParameterGroup, Side
from i2i_dist.methods import METHODS
from i2i_dist.pool import ImagePools
from i2i_dist.step import Sides, update
from tests.methods.cases import CASES
from tests.methods.cases.common import SEED
from tests.ranks import run_ranks
from tests.trainer import Trainer, differing
from tests.updates import ExactForward, global_batch, micro_batches, small_method, stages_of, whole_batch

STEPS, NAN_STEPS, BAD = 4, 3, 1  # the update BAD of NAN_STEPS meets a NaN
RESUMED_AT = (0, 3)
STAGES = range(4)
PATIENCE = 600  # seconds for the whole matrix on a busy machine

pytestmark = pytest.mark.timeout(PATIENCE)


def accumulations(name: str) -> tuple[int, ...]:
    """Where a sample's loss depends on the whole batch, or two micro-batches would cut groups, there is one only."""
    method = small_method(name)
    return (1,) if method.couples_batch or global_batch(method) // 4 % method.group else (1, 2)


def first_of_each_order() -> list[str]:
    """Name one method for each order of turns, from which alone follows which steps a NaN drops."""
    orders: dict[tuple[Side, ...], str] = {}
    for name in CASES:
        if 2 in accumulations(name):
            orders.setdefault(small_method(name).turns(BAD), name)
    return list(orders.values())


def first_with_both_turns(name: str) -> int:
    """Return the number of a method's first update in which both sides train."""
    turns = small_method(name).turns
    return next(number for number in range(STEPS) if len(turns(number)) == 2)


def cases_of(name: str) -> list[tuple[int, int]]:
    """Return the stages and accumulations: all for the first method of an order, by turns for those that follow.

    Where passes of the critics move buffers, which must not depend on how many passes there are, the lowest and the
    highest stage have both.
    """
    allowed = accumulations(name)
    if name in first_of_each_order():
        return list(itertools.product(STAGES, allowed))
    cases = {(stage, allowed[stage % len(allowed)]) for stage in STAGES}
    if persistent_buffers(small_method(name).discriminator):
        cases |= set(itertools.product((STAGES[0], STAGES[-1]), allowed))
    return sorted(cases)


MATRIX = [(name, *case) for name in CASES for case in cases_of(name)]
ADAM_MATRIX, RESUMED_MATRIX = (list(itertools.product(CASES, stages)) for stages in (STAGES, RESUMED_AT))
NAN_MATRIX = list(itertools.product(first_of_each_order(), STAGES, (1, 2)))
LATE_NAN_MATRIX = list(itertools.product((0, 3), (1, 2)))


def plain_run(
    name: str,
    steps: range,
    adam: bool = False,
    dropped: frozenset[int] = frozenset(),
    critics_only: frozenset[int] = frozenset(),
) -> dict[str, Tensor]:
    method = small_method(name)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for side, groups in method.parameter_groups().items():
        options = [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
        optimizers[side] = torch.optim.Adam(options) if adam else torch.optim.SGD(options, momentum=0.9)
    idle = torch.optim.SGD(method.generator.parameters(), lr=0.0)
    for step in steps:
        if step not in dropped:
            with ExactForward():
                stepping = {**optimizers, "generator": idle} if step in critics_only else optimizers
                CASES[name].step(method, whole_batch(method, step), step, stepping)
    if adam:  # after one step the first moment is a tenth of the gradient
        return {
            f"{side}/{parameter_name}": optimizers[side].state[parameter]["exp_avg"]
            for side in optimizers
            for parameter_name, parameter in getattr(method, side).named_parameters()
        }
    return {f"{side}/{n}": p.detach() for side in optimizers for n, p in getattr(method, side).named_parameters()}


# ----------------------------------------------------------------------------------------- the same under engines


def engine_sides(method: Any, stages: tuple[int, int], accumulation: int, adam: bool = False) -> Sides:
    _, world = rank_and_world()
    sides: Sides = {}
    for side, stage in zip(("generator", "discriminator"), stages, strict=True):
        micro_batch = global_batch(method) // world // accumulation
        layout = Layout(micro_batch, accumulation, world, stage=stage, persistence_threshold=0)
        options: dict[str, Any] = {} if adam else {"optimizer": torch.optim.SGD, "momentum": 0.9}
        groups = method.parameter_groups()[side]
        if adam:
            groups = [group._replace(betas=(0.9, 0.999)) for group in groups]
        sides[side] = SideEngine(getattr(method, side), groups, layout, torch.device("cpu"), **options)  # type: ignore
    return sides


def whole(sides: Sides, kind: str) -> dict[str, Tensor]:
    """Put together, over the ranks, the captured tensors of one kind."""
    tensors = {}
    for name, side in sides.items():
        captured = capture(side, {})
        for key, (shape, _) in captured.tensors.items():
            if key.startswith(f"{kind}/"):
                full = torch.zeros(math.prod(shape))
                if key in captured.pieces:
                    start, values = captured.pieces[key]
                    full[start : start + len(values)] = values
                if rank_and_world()[1] > 1:
                    torch.distributed.all_reduce(full)
                tensors[f"{name}/{key.partition('/')[2]}"] = full.view(shape)
    return tensors


def engine_run(
    name: str, stage: int | tuple[int, int], accumulation: int, steps: range, adam: bool = False, poison: Any = None
) -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
    method = small_method(name)
    sides = engine_sides(method, stages_of(method, stage) if isinstance(stage, int) else stage, accumulation, adam)
    pools = ImagePools(method.fakes, 0, SEED)
    skipped = []
    for step in steps:
        batches = micro_batches(method, step, accumulation)
        if poison is not None:
            poison(step, method, batches)
        with ExactForward():
            seen = step * global_batch(method)
            done = update(method, sides, batches, pools, seed=SEED, number=step, images_seen=seen)
        skipped.append(done.skipped)
    assert replicas.difference(sides) is None
    return whole(sides, "exp_avg" if adam else "param"), skipped


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def rank_1_picture_is_nan(step: int, method: Any, batches: list[Any]) -> None:
    if step == BAD and rank_and_world()[0] == 1:
        batches[-1][0][0, 0, 0, 0] = float("nan")


def rank_1_generator_loss_is_nan(step: int, method: Any, batches: list[Any]) -> None:
    """One term, of the update's first micro-batch only."""

    def poisoned(*args: Any) -> dict[str, Tensor]:
        del method.generator_loss  # uncovers the method's own
        terms: dict[str, Tensor] = method.generator_loss(*args)
        return {**terms, "identity_a": terms["identity_a"] * float("nan")}

    if step == BAD and rank_and_world()[0] == 1:
        method.generator_loss = poisoned


class WithBuffer(torch.nn.Module):
    """A module whose buffer starts differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.slow = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
        self.register_buffer("memory", torch.full((2,), float(rank_and_world()[0] + 1)))

    def forward(self) -> Tensor:
        return self.weight.sum() + self.slow.sum()


def what_deepspeed_does() -> dict[str, Any]:
    """Run on every rank: what engines.py settles because DeepSpeed would do it otherwise."""
    module = WithBuffer()
    groups = [
        ParameterGroup("falling", [module.weight], 0.1, (0.9, 0.999)),
        ParameterGroup("nearly constant", [module.slow], 0.2, (0.9, 0.999), constant=0.75),
    ]
    side = SideEngine(module, groups, Layout(1, 1, rank_and_world()[1]), torch.device("cpu"))
    silent = WithBuffer()
    silent_config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.Adam(silent.parameters())
    silent_engine, *_ = deepspeed.initialize(model=silent, optimizer=optimizer, config=silent_config)
    reduction_group = side.engine.data_parallel_group
    return {
        "clipping": side.engine.gradient_clipping(),
        "clipping where a configuration is silent": silent_engine.gradient_clipping(),
        "buffer": module.memory.tolist(),
        "buffer where nobody broadcasts": silent.memory.tolist(),
        "timeout": reduction_group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
        "rates": [side.set_learning_rate(factor) for factor in (1.0, 0.5, 0.0)],
    }


def drifted(stage: int) -> list[str | None]:
    """Run on every rank: what is said when a bit of rank 1 is another, of a buffer and then of a weight before it."""
    sides: Sides = {}
    for name in SIDES:
        module = WithBuffer()
        groups = [ParameterGroup("all", list(module.parameters()), 0.1, (0.9, 0.999))]
        sides[name] = SideEngine(module, groups, Layout(1, 1, rank_and_world()[1], stage), torch.device("cpu"))
        sides[name].backward(sides[name](), last=True)
        sides[name].step(skip=False)  # from where on ZeRO 3 has small parameters whole
    found = [replicas.difference(sides)]
    for tensor in (module.memory, module.slow.data):
        if rank_and_world()[0] == 1:
            tensor.view(torch.int32)[1] ^= 1
        found.append(replicas.difference(sides))
    return found


class Bounded(torch.nn.Module):
    """Five numbers that a step throws out of their bounds, and two that it may throw anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.rho = torch.nn.Parameter(torch.full((5,), 0.5))  # an odd number, of which two ranks hold unequal parts
        self.weight = torch.nn.Parameter(torch.full((2,), 0.5))

    def forward(self, pull: Tensor) -> Tensor:
        return (self.rho * pull).sum() + (self.weight * pull[:2]).sum()


PULLS = [torch.tensor(pull) for pull in ([1.0, -1.0, 0.0, 1.0, -1.0], [-0.1, 0.1, -0.2, 0.0, 0.3])]


def bounded_loop() -> list[Tensor]:
    """What `bounded_run` has to give, in arithmetic: SGD at rate 1 with coupled decay on `weight` alone."""
    rho, weight, seen = torch.full((5,), 0.5), torch.full((2,), 0.5), []
    for pull in PULLS:
        rho, weight = (rho - pull).clamp(0, 1), weight - (pull[:2] + 0.5 * weight)
        seen.append(torch.cat([rho, weight]))
    return seen


def bounded_run(stage: int) -> list[Tensor]:
    """Run on every rank: what the module computes with after each step, and at the end what a checkpoint would hold."""
    module = Bounded()
    groups = [
        ParameterGroup("rho", [module.rho], 1.0, (0.5, 0.9), bounds=(0.0, 1.0)),
        ParameterGroup("weight", [module.weight], 1.0, (0.5, 0.9), weight_decay=0.5),
    ]
    layout = Layout(1, 1, rank_and_world()[1], stage=stage, persistence_threshold=0)
    side = SideEngine(module, groups, layout, torch.device("cpu"), optimizer=torch.optim.SGD, momentum=0.0)
    seen = []
    for pull in PULLS:
        side.backward(side(pull), last=True)
        assert met_not_finite([side]) is None
        side.step(skip=False)
        probes = torch.eye(5)
        with torch.no_grad():  # the module adds up what each probe touches
            touched = torch.stack([side(probe) for probe in probes])
        weight = whole({"generator": side}, "param")["generator/weight"]
        seen.append(torch.cat([touched - F.pad(weight, (0, 3)), weight]))
    assert torch.allclose(whole({"generator": side}, "param")["generator/rho"], seen[-1][:5], atol=1e-6)
    return seen


def late_nan_matrix() -> dict[str, Any]:
    """Run on every rank: where the discriminator has stepped before the generator meets a NaN."""
    results: dict[str, Any] = {}
    critics_only = plain_run("dclgan", range(NAN_STEPS), critics_only=frozenset({BAD}))
    for other, steps in (("dropped", {"dropped": frozenset({BAD})}), ("undisturbed", {})):
        results[f"late nan, {other}"] = distance(critics_only, plain_run("dclgan", range(NAN_STEPS), **steps))
    for stage, accumulation in LATE_NAN_MATRIX:
        poison = rank_1_generator_loss_is_nan
        ours, skipped = engine_run("dclgan", stage, accumulation, range(NAN_STEPS), poison=poison)
        results[f"late nan {stage} {accumulation}"] = (distance(ours, critics_only), skipped)
    return results


def pool_size(name: str) -> int:
    """A pool takes one fake for each sample, which there are not where samples come in groups."""
    method = small_method(name)
    return global_batch(method) // 2 if method.group == 1 else 0


def resumed(name: str, stage: int, directory: Path) -> dict[str, list[str]]:
    """Train, save, go on in other engines that have restored it, and name the files that differ from going on in these.

    The pools are full after the first update, so what they hold matters.
    """
    half, end, pool = STEPS // 2, STEPS, pool_size(name)
    trainer = Trainer(small_method(name), stage, pool)
    half_name, end_name = (directory_name(steps * trainer.batch) for steps in (half, end))
    trainer.train(0, half)
    assert trainer.save(directory / "whole", half) is None
    trainer.train(half, end)
    assert trainer.save(directory / "whole", end) is None
    trainer = Trainer(small_method(name, seed=7), stage, pool)
    trainer.restore(directory / "whole" / half_name)
    trainer.train(half, end)
    assert trainer.save(directory / "resumed", end) is None
    found = {
        "resumed": differing(directory / "resumed" / end_name, directory / "whole" / end_name),
        "trained": differing(directory / "whole" / half_name, directory / "whole" / end_name),
    }
    barrier()  # nobody goes on to write while another still reads
    return found


def one_method(name: str, directory: Path) -> dict[str, Any]:
    """Run on every rank: a method's cases, against its plain loop."""
    results: dict[str, Any] = {}
    both = first_with_both_turns(name)
    plain, first = plain_run(name, range(STEPS)), plain_run(name, range(both, both + 1), adam=True)
    results[f"{name} moved"] = distance(plain, plain_run(name, range(0)))
    largest = max(float(value.abs().max()) for value in first.values())
    for stage, accumulation in cases_of(name):
        ours, _ = engine_run(name, stage, accumulation, range(STEPS))
        results[f"{name} {stage} {accumulation}"] = distance(ours, plain)
    for stage in STAGES:
        adam, _ = engine_run(name, stage, accumulations(name)[-1], range(both, both + 1), adam=True)
        results[f"{name} {stage} adam"] = distance(adam, first) / largest
    results[f"{name} mixed"] = distance(engine_run(name, (3, 1), 1, range(STEPS))[0], plain)
    for stage in RESUMED_AT:
        results[f"{name} {stage} files"] = resumed(name, stage, directory / f"{name}_{stage}")
    return results


def matrix(directory: str) -> dict[str, Any]:
    """Run on every rank: all cases."""
    results: dict[str, Any] = {}
    for name in CASES:
        results |= one_method(name, Path(directory))
    dropped = {name: plain_run(name, range(NAN_STEPS), dropped=frozenset({BAD})) for name in first_of_each_order()}
    for name, stage, accumulation in NAN_MATRIX:
        ours, skipped = engine_run(name, stage, accumulation, range(NAN_STEPS), poison=rank_1_picture_is_nan)
        results[f"{name} {stage} {accumulation} nan"] = (distance(ours, dropped[name]), skipped)
    results |= late_nan_matrix()
    for stage in STAGES:
        pairs = zip(bounded_run(stage), bounded_loop(), strict=True)
        results[f"bounded {stage}"] = [float((one - other).abs().max()) for one, other in pairs]
        results[f"drifted {stage}"] = drifted(stage)
    largest, engines._LARGEST_BUCKET = engines._LARGEST_BUCKET, 900  # elements; some parameters have more
    plain = plain_run("cyclegan", range(STEPS))
    for stage in STAGES[1:]:
        results[f"small buckets {stage}"] = distance(engine_run("cyclegan", stage, 2, range(STEPS))[0], plain)
    engines._LARGEST_BUCKET = largest
    results["deepspeed"] = what_deepspeed_does()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One pair of rank processes runs the whole matrix."""
    logs, files = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("checkpoints")
    first, second = run_ranks(2, "tests.test_engines:matrix", logs, str(files), timeout=PATIENCE - 20)
    silent = (
        first["deepspeed"].pop("buffer where nobody broadcasts"),
        second["deepspeed"].pop("buffer where nobody broadcasts"),
    )
    assert first == second, "the ranks disagree"
    first["deepspeed"]["buffers where nobody broadcasts"] = silent
    assert isinstance(first, dict)
    return first


@pytest.mark.parametrize(("name", "stage", "accumulation"), MATRIX)
def test_two_ranks_equal_a_plain_loop(results: dict[str, Any], name: str, stage: int, accumulation: int) -> None:
    assert results[f"{name} moved"] > 1e-2  # the loop went somewhere, so the distance below means something
    assert results[f"{name} {stage} {accumulation}"] <= 1e-6


@pytest.mark.parametrize(("name", "stage"), ADAM_MATRIX)
def test_adams_first_gradients_are_those_of_a_plain_loop(results: dict[str, Any], name: str, stage: int) -> None:
    assert results[f"{name} {stage} adam"] <= 1e-6


@pytest.mark.parametrize(("name", "stage"), RESUMED_MATRIX)
def test_resumed_training_ends_in_the_same_bytes(results: dict[str, Any], name: str, stage: int) -> None:
    """Weights, moments, averages, buffers, and the pools of both ranks."""
    found = results[f"{name} {stage} files"]
    pools = ["pool_rank_0000.safetensors", "pool_rank_0001.safetensors"] if pool_size(name) else []
    assert found["trained"] == ["discriminator.safetensors", "generator.safetensors", *pools]
    assert found["resumed"] == []


@pytest.mark.parametrize("name", CASES)
def test_sides_may_have_different_stages(results: dict[str, Any], name: str) -> None:
    assert results[f"{name} mixed"] <= 1e-6


@pytest.mark.parametrize(("name", "stage", "accumulation"), NAN_MATRIX)
def test_a_nan_on_one_rank_drops_the_update_everywhere(
    results: dict[str, Any], name: str, stage: int, accumulation: int
) -> None:
    difference, skipped = results[f"{name} {stage} {accumulation} nan"]
    turns = small_method(name).turns(BAD)
    assert skipped == [(), tuple(side for side in SIDES if side in turns), ()]
    assert difference <= 1e-6


@pytest.mark.parametrize(("stage", "accumulation"), LATE_NAN_MATRIX)
def test_a_nan_in_the_generators_loss_alone_leaves_the_critics_their_step(
    results: dict[str, Any], stage: int, accumulation: int
) -> None:
    assert min(results["late nan, dropped"], results["late nan, undisturbed"]) > 1e-3  # other loops go elsewhere
    difference, skipped = results[f"late nan {stage} {accumulation}"]
    assert skipped == [(), ("generator",), ()]
    assert difference <= 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bounds_hold_and_decay_is_coupled_after_every_step(results: dict[str, Any], stage: int) -> None:
    """In the module and in the optimizer's own copy, which would bring back what only the module forgets."""
    after = [step[:5] for step in bounded_loop()]
    assert all(float(rho.min()) == 0.0 and float(rho.max()) == 1.0 for rho in after[:1])  # both bounds are reached
    assert max(results[f"bounded {stage}"]) <= 1e-6


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_parameter_may_be_larger_than_the_bucket(results: dict[str, Any], stage: int) -> None:
    """As the layer of 268 million elements is in a full U-GAT-IT."""
    assert max(p.numel() for p in small_method("cyclegan").generator.parameters()) > 900
    assert results[f"small buckets {stage}"] <= 1e-6


def test_nothing_is_clipped_that_nobody_asked_to_clip(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["clipping"] == 0.0
    assert results["deepspeed"]["clipping where a configuration is silent"] == 1.0  # why it is always written


def test_buffers_start_equal_on_all_ranks(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["buffer"] == [1.0, 1.0]
    assert results["deepspeed"]["buffers where nobody broadcasts"] == ([1.0, 1.0], [2.0, 2.0])


@pytest.mark.parametrize("stage", STAGES)
def test_one_other_bit_on_one_rank_is_found_at_every_stage(results: dict[str, Any], stage: int) -> None:
    none, buffer, weight = results[f"drifted {stage}"]
    host = socket.gethostname()
    ranks = f"ranks 0 ({host}) and 1 ({host}) differ, and no majority tells which is right"
    assert none is None
    assert buffer == f"the discriminator's memory is not the same on all ranks: {ranks}"
    assert weight == f"the discriminator's slow is not the same on all ranks: {ranks}"


def test_gradient_collectives_follow_the_timeout(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["timeout"] == 60  # what tests/ranks.py starts with; DeepSpeed's own group has 1800


def test_learning_rates_follow_the_factor_but_for_their_constant_share(results: dict[str, Any]) -> None:
    rates = results["deepspeed"]["rates"]
    assert [rate["falling"] for rate in rates] == pytest.approx([0.1, 0.05, 0.0])
    assert [rate["nearly constant"] for rate in rates] == pytest.approx([0.2, 0.175, 0.15])


def coupled() -> list[tuple[str, dict[str, Any]]]:
    return [("dclgan", {"negatives": "global_batch"})] + [(n, {}) for n in CASES if small_method(n).couples_batch]


@pytest.mark.parametrize(("name", "changes"), coupled())
def test_accumulation_is_refused_where_a_loss_depends_on_the_whole_batch(name: str, changes: dict[str, Any]) -> None:
    config = RunConfig(method={"name": name}, data=DataConfig(root="nowhere"))
    with pytest.raises(ConfigError, match=r"train\.micro_batch: given 2, .* leave train\.micro_batch out"):
        assembly._check_fits(config, small_method(name, **changes), Layout(2, 2, 1))


def test_a_batch_that_cuts_groups_apart_is_refused() -> None:
    train = TrainConfig(global_batch=12)
    config = RunConfig(method={"name": "cyclegan"}, data=DataConfig(root="nowhere"), train=train)
    method = small_method("cyclegan")
    method.group = 2
    with pytest.raises(ConfigError, match=r"train\.global_batch: given 12, .* 2 consecutive .*global_batch=16$"):
        assembly._check_fits(config, method, Layout(3, 1, 4))
    assembly._check_fits(config, method, Layout(4, 1, 4))


def test_every_method_is_in_the_matrix() -> None:
    assert CASES.keys() == METHODS.keys()
