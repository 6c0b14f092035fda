"""Two ranks under DeepSpeed train what a plain PyTorch loop trains in one process, at every ZeRO stage."""

from __future__ import annotations

import itertools
import math
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from i2i_dist.data.batch import Batch
from i2i_dist.distributed import rank_and_world
from i2i_dist.engine_state import capture
from i2i_dist.engines import Layout, SideEngine
from i2i_dist.method import ParameterGroup
from i2i_dist.methods import METHODS, resolve
from i2i_dist.pool import ImagePools
from i2i_dist.step import Sides, update
from tests.methods.cases import CASES
from tests.methods.cases.common import GLOBAL_BATCH, SEED, SIZE
from tests.ranks import run_ranks

STEPS, NAN_STEPS = 5, 3
MATRIX = list(itertools.product(CASES, range(4), (1, 2)))
LATE_NAN_MATRIX = list(itertools.product((0, 3), (1, 2)))


def small_method(name: str, **changes: Any) -> Any:
    method, config = resolve({"name": name, **CASES[name].small, **changes})
    built = method(config, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights and biases of some size, so that five steps go somewhere
        for parameter in [*built.generator.parameters(), *built.discriminator.parameters()]:
            parameter.mul_(10.0).add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return built


class ExactForward(TorchFunctionMode):
    """Convolutions and linear layers compute in the dtype of their input, fp64 here, from their fp32 weights.

    Rounding in fp32 now and then carries a value over a kink (ReLU, L1), and from there two runs drift apart whatever
    the engines do. In fp64 what remains is the arithmetic under test: reduction, sharding, optimizer.
    """

    LAYERS = (F.conv2d, F.conv_transpose2d, F.linear)

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.LAYERS:
            args = [arg.to(args[0].dtype) if isinstance(arg, Tensor) else arg for arg in args]
        return function(*args, **(kwargs or {}))


def images(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    a = torch.rand(GLOBAL_BATCH, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1
    b = (torch.rand(GLOBAL_BATCH, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) * 2 - 1).abs()
    return a, b


def micro_batches(step: int, accumulation: int) -> list[Batch]:
    rank, world = rank_and_world()
    a, b = images(step)
    per_rank = GLOBAL_BATCH // world
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    positions = torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH
    return [
        Batch(*parts, step * GLOBAL_BATCH)
        for parts in zip(
            a[mine].chunk(accumulation), b[mine].chunk(accumulation), positions[mine].chunk(accumulation), strict=True
        )
    ]


def plain_run(
    name: str, steps: int, adam: bool, dropped: frozenset[int] = frozenset(), critics_only: frozenset[int] = frozenset()
) -> dict[str, Tensor]:
    method = small_method(name)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for side, groups in method.parameter_groups().items():
        options = [{"params": list(g.parameters), "lr": g.lr} for g in groups]
        optimizers[side] = torch.optim.Adam(options) if adam else torch.optim.SGD(options, momentum=0.9)
    idle = torch.optim.SGD(method.generator.parameters(), lr=0.0)
    for step in range(steps):
        if step not in dropped:
            with ExactForward():
                stepping = {**optimizers, "generator": idle} if step in critics_only else optimizers
                CASES[name].step(method, *images(step), step, stepping)
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
        layout = Layout(
            GLOBAL_BATCH // world // accumulation, accumulation, world, stage=stage, persistence_threshold=0
        )
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
    name: str, stages: tuple[int, int], accumulation: int, steps: int, adam: bool = False, poison: Any = None
) -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
    method = small_method(name)
    sides = engine_sides(method, stages, accumulation, adam)
    pools = ImagePools(method.fakes, 0, SEED)
    skipped = []
    for step in range(steps):
        batches = micro_batches(step, accumulation)
        if poison is not None:
            poison(step, method, batches)
        with ExactForward():
            seen = step * GLOBAL_BATCH
            done = update(method, sides, lambda _, now=batches: now, pools, seed=SEED, number=step, images_seen=seen)
        skipped.append(done.skipped)
    return whole(sides, "exp_avg" if adam else "param"), skipped


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def rank_1_picture_is_nan(step: int, method: Any, batches: list[Batch]) -> None:
    if step == 1 and rank_and_world()[0] == 1:
        batches[-1].a[0, 0, 0, 0] = float("nan")


def rank_1_generator_loss_is_nan(step: int, method: Any, batches: list[Batch]) -> None:
    """One term, of the update's first micro-batch only."""

    def poisoned(*args: Any) -> dict[str, Tensor]:
        del method.generator_loss  # uncovers the method's own
        terms: dict[str, Tensor] = method.generator_loss(*args)
        return {**terms, "identity_a": terms["identity_a"] * float("nan")}

    if step == 1 and rank_and_world()[0] == 1:
        method.generator_loss = poisoned


class WithBuffer(torch.nn.Module):
    """A module whose buffer starts differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("memory", torch.full((2,), float(rank_and_world()[0] + 1)))


def what_deepspeed_does() -> dict[str, Any]:
    """Run on every rank: what engines.py settles because DeepSpeed would do it otherwise."""
    group = [ParameterGroup("all", list((module := WithBuffer()).parameters()), 0.1, (0.9, 0.999))]
    side = SideEngine(module, group, Layout(1, 1, rank_and_world()[1]), torch.device("cpu"))
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
        "rates": side.set_learning_rate(0.5),
    }


def late_nan_matrix() -> dict[str, Any]:
    """Run on every rank: where the discriminator has stepped before the generator meets a NaN."""
    results: dict[str, Any] = {}
    critics_only = plain_run("dclgan", NAN_STEPS, adam=False, critics_only=frozenset({1}))
    for other, steps in (("dropped", {"dropped": frozenset({1})}), ("undisturbed", {})):
        results[f"late nan, {other}"] = distance(critics_only, plain_run("dclgan", NAN_STEPS, adam=False, **steps))
    for stage, accumulation in LATE_NAN_MATRIX:
        poison = rank_1_generator_loss_is_nan
        ours, skipped = engine_run("dclgan", (stage, stage), accumulation, NAN_STEPS, poison=poison)
        results[f"late nan {stage} {accumulation}"] = (distance(ours, critics_only), skipped)
    return results


def matrix() -> dict[str, Any]:
    """Run on every rank: all cases, against the plain loops."""
    results: dict[str, Any] = {}
    for name in CASES:
        plain, first = plain_run(name, STEPS, adam=False), plain_run(name, 1, adam=True)
        start = plain_run(name, 0, adam=False)
        results[f"{name} moved"] = distance(plain, start)
        for stage, accumulation in itertools.product(range(4), (1, 2)):
            case = f"{name} {stage} {accumulation}"
            results[case] = distance(engine_run(name, (stage, stage), accumulation, STEPS)[0], plain)
            adam, _ = engine_run(name, (stage, stage), accumulation, 1, adam=True)
            results[f"{case} adam"] = distance(adam, first) / max(float(v.abs().max()) for v in first.values())
        results[f"{name} mixed"] = distance(engine_run(name, (3, 1), 1, STEPS)[0], plain)
        dropped = plain_run(name, NAN_STEPS, adam=False, dropped=frozenset({1}))
        for stage, accumulation in itertools.product(range(4), (1, 2)):
            ours, skipped = engine_run(name, (stage, stage), accumulation, NAN_STEPS, poison=rank_1_picture_is_nan)
            results[f"{name} {stage} {accumulation} nan"] = (distance(ours, dropped), skipped)
    results |= late_nan_matrix()
    results["deepspeed"] = what_deepspeed_does()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One pair of rank processes runs the whole matrix."""
    first, second = run_ranks(2, "tests.test_engines:matrix", tmp_path_factory.mktemp("matrix"))
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
    assert results[f"{name} {stage} {accumulation} adam"] <= 1e-6


@pytest.mark.parametrize("name", CASES)
def test_sides_may_have_different_stages(results: dict[str, Any], name: str) -> None:
    assert results[f"{name} mixed"] <= 1e-6


@pytest.mark.parametrize(("name", "stage", "accumulation"), MATRIX)
def test_a_nan_on_one_rank_drops_the_update_everywhere(
    results: dict[str, Any], name: str, stage: int, accumulation: int
) -> None:
    difference, skipped = results[f"{name} {stage} {accumulation} nan"]
    assert skipped == [(), ("generator", "discriminator"), ()]
    assert difference <= 1e-6


@pytest.mark.parametrize(("stage", "accumulation"), LATE_NAN_MATRIX)
def test_a_nan_in_the_generators_loss_alone_leaves_the_critics_their_step(
    results: dict[str, Any], stage: int, accumulation: int
) -> None:
    assert min(results["late nan, dropped"], results["late nan, undisturbed"]) > 1e-3  # other loops go elsewhere
    difference, skipped = results[f"late nan {stage} {accumulation}"]
    assert skipped == [(), ("generator",), ()]
    assert difference <= 1e-6


def test_nothing_is_clipped_that_nobody_asked_to_clip(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["clipping"] == 0.0
    assert results["deepspeed"]["clipping where a configuration is silent"] == 1.0  # why it is always written


def test_buffers_start_equal_on_all_ranks(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["buffer"] == [1.0, 1.0]
    assert results["deepspeed"]["buffers where nobody broadcasts"] == ([1.0, 1.0], [2.0, 2.0])


def test_gradient_collectives_follow_the_timeout(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["timeout"] == 60  # what tests/ranks.py starts with; DeepSpeed's own group has 1800


def test_learning_rates_follow_the_factor(results: dict[str, Any]) -> None:
    assert results["deepspeed"]["rates"] == {"all": 0.05}


def test_every_method_is_in_the_matrix() -> None:
    assert CASES.keys() == METHODS.keys()
