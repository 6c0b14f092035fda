"""Two ranks under DeepSpeed train what a plain PyTorch loop trains in one process, whatever the engines are asked for.

In fp32 the plain loop is the released code's step, every pass on its own, and convolutions are computed in fp64: what
remains is 1e-6. In bf16 it is the same update with plain sides and `torch.autocast` around their passes, on one piece
of the batch after the other, cut as the ranks and their micro-batches cut it: rounding a gradient in bf16 depends on
the samples in it. There the distance is the norm of all differences over that of all gradients, or of all moves.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist import assembly, engines, replicas
from i2i_dist.checkpoint import directory_name
from i2i_dist.config import ConfigError, DataConfig, RunConfig, TrainConfig
from i2i_dist.distributed import Ranks, barrier, rank_and_world
from i2i_dist.engine_state import capture, persistent_buffers
from i2i_dist.engines import Asked, Layout, Precision, SideEngine, met_not_finite, repeated_blocks
from i2i_dist.method import SIDES, ParameterGroup, Side
from i2i_dist.methods import METHODS
from i2i_dist.pool import ImagePools
from i2i_dist.step import Sides, update
from tests.methods.cases import CASES
from tests.methods.cases.common import SEED
from tests.methods.plain_side import ADAM, clip, plain_sides
from tests.needs import DEVICES
from tests.ranks import run_ranks
from tests.trainer import Trainer, differing
from tests.updates import ExactForward, global_batch, in_fp32, micro_batches, part_of, small_method, whole_batch

STEPS, BAD = 3, 1  # the update BAD may meet a NaN
STAGES = range(4)
PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")
OPTIONS = ("accumulation", "clipped", "offload", "recomputed")
PATIENCE = 600  # seconds for the whole matrix on a busy machine
SGD = functools.partial(torch.optim.SGD, momentum=0.9)

pytestmark = pytest.mark.timeout(PATIENCE)


class Cell(NamedTuple):
    """What both sides of a method are asked for, but for the critics' own stage."""

    name: str
    stage: int
    critics_stage: int
    precision: Precision
    accumulation: int
    clipped: bool
    offload: bool
    recomputed: bool


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


def updates_of(name: str) -> range:
    """Return updates of a method: from the first in which both sides train to the second, so that momentum counts."""
    turns = small_method(name).turns
    first, second = itertools.islice((number for number in itertools.count() if len(turns(number)) == 2), 2)
    return range(first, second + 1)


def cells_of(name: str) -> list[Cell]:
    """Return a method's share of the matrix: every stage in each precision, the other options by turns.

    Ten methods follow one another through the eight ways to have three options, at a place of their own for each stage.
    Where passes of the critics move buffers, which must not depend on how many passes there are, the lowest and the
    highest stage have both numbers of micro-batches in fp32.
    """
    index, allowed, method = list(CASES).index(name), accumulations(name), small_method(name)
    repeats = bool(repeated_blocks(method.generator))
    cells = []
    for precision, stage in itertools.product(PRECISIONS, STAGES):
        place = index + 3 * stage + 5 * PRECISIONS.index(precision)
        several, clipped, offload = (bool(place >> bit & 1) for bit in range(3))
        cells.append(
            Cell(
                name, stage, (stage + index + PRECISIONS.index(precision)) % 4, precision,
                allowed[-1 if several else 0], clipped, offload and stage > 0, repeats and several ^ clipped ^ offload,
            )
        )  # fmt: skip
    if persistent_buffers(method.discriminator):
        extremes = [cell for cell in cells if cell.precision == "fp32" and cell.stage in (STAGES[0], STAGES[-1])]
        cells += [cell._replace(accumulation=count) for cell in extremes for count in {*allowed} - {cell.accumulation}]
    highest = 2 if method.penalised else 3
    return [cell._replace(critics_stage=min(cell.critics_stage, highest)) for cell in cells]


CELLS = [cell for name in CASES for cell in cells_of(name)]
ADAM_MATRIX = [(name, stage) for index, name in enumerate(CASES) for stage in STAGES if (stage + index) % 2]
RESUMED_MATRIX = [(name, STAGES[index % 4]) for index, name in enumerate(CASES)]
NAN_MATRIX = [  # method, stage, micro-batches, optimizers offloaded
    (name, stage, 1 + (stage + index) % 2, bool(stage and (stage + index) % 3))
    for index, name in enumerate(first_of_each_order())
    for stage in STAGES
]
LATE_NAN_MATRIX = [  # what is NaN, stage, micro-batches, optimizers offloaded
    ("loss", 0, 1, False), ("loss", 0, 2, False), ("loss", 2, 1, True), ("loss", 3, 2, False),
    ("gradients", 0, 2, False), ("gradients", 1, 1, True), ("gradients", 2, 2, False), ("gradients", 3, 1, True),
]  # fmt: skip


class Trained(NamedTuple):
    """What came of a loop.

    Attributes:
        gradients: Of each parameter, in its first update; of Adam the share that its first moment takes.
        parameters: At the end.
    """

    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def plain_run(
    name: str,
    steps: range,
    adam: bool = False,
    clipping: float = 0.0,
    dropped: frozenset[int] = frozenset(),
    critics_only: frozenset[int] = frozenset(),
) -> Trained:
    """Train in fp32, in this process, on the whole batch."""
    method = small_method(name)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for side, groups in method.parameter_groups().items():
        options: list[dict[str, Any]] = [
            {"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "betas": g.betas} for g in groups
        ]
        # Fused as the engines' is: the other rounds otherwise, which now and then carries a value over a kink.
        optimizers[side] = ADAM(options) if adam else SGD(options)
        clip(optimizers[side], clipping)
    idle = torch.optim.SGD(method.generator.parameters(), lr=0.0)
    gradients: dict[str, Tensor] = {}
    for step in steps:
        if step not in dropped:
            with ExactForward():
                stepping = {**optimizers, "generator": idle} if step in critics_only else optimizers
                CASES[name].step(method, whole_batch(method, step), step, stepping)
        gradients = gradients or of_plain_sides(method, optimizers, "exp_avg" if adam else "momentum_buffer")
    return Trained(gradients, of_plain_sides(method, optimizers, "param"))


def autocast_run(name: str, steps: range, pieces: int, clipping: float = 0.0, precision: Precision = "bf16") -> Trained:
    """Train in this process, under autocast or in fp32, on one piece of the batch after the other."""
    method = small_method(name)
    sides = plain_sides(method, optimizer=SGD, precision=precision, clipping=clipping, pieces=pieces)
    pools, gradients, size = ImagePools(method.fakes, 0, SEED), {}, global_batch(method) // pieces
    for step in steps:
        batch, seen = in_fp32(whole_batch(method, step)), step * global_batch(method)
        parts = [part_of(batch, slice(first, first + size)) for first in range(0, global_batch(method), size)]
        update(method, sides, parts, pools, seed=SEED, number=step, images_seen=seen)
        optimizers = {side: sides[side].optimizer for side in SIDES}
        gradients = gradients or of_plain_sides(method, optimizers, "momentum_buffer")
    return Trained(gradients, of_plain_sides(method, optimizers, "param"))


def of_plain_sides(method: Any, optimizers: Any, kind: str) -> dict[str, Tensor]:
    """Return the parameters, or what the optimizers hold for them; nothing of a side that has not stepped yet."""
    return {
        f"{side}/{name}": (parameter if kind == "param" else optimizers[side].state[parameter][kind]).detach().clone()
        for side in optimizers
        for name, parameter in getattr(method, side).named_parameters()
        if kind == "param" or kind in optimizers[side].state[parameter]
    }


# ----------------------------------------------------------------------------------------- the same under engines


def engine_sides(method: Any, cell: Cell, clipping: float, adam: bool = False) -> Sides:
    _, world = rank_and_world()
    sides: Sides = {}
    for side, stage in zip(SIDES, (cell.stage, cell.critics_stage), strict=True):
        layout = Layout(
            global_batch(method) // world // cell.accumulation, cell.accumulation, world, stage,
            clipping=clipping, precision=cell.precision, offload=cell.offload and stage > 0,
            recomputed=cell.recomputed, persistence_threshold=0,
        )  # fmt: skip
        options: dict[str, Any] = {} if adam else {"optimizer": torch.optim.SGD, "momentum": 0.9}
        groups = method.parameter_groups()[side]
        sides[side] = SideEngine(getattr(method, side), groups, layout, torch.device("cpu"), **options)
    return sides


def whole(sides: Sides, kind: str) -> dict[str, Tensor]:
    """Put together, over the ranks, the captured tensors of one kind."""
    shapes: dict[str, tuple[int, ...]] = {}
    parts = []
    for name, side in sides.items():
        captured = capture(side, {})
        for key, (shape, _) in captured.tensors.items():
            if key.startswith(f"{kind}/"):
                full = torch.zeros(math.prod(shape))
                if key in captured.pieces:
                    start, values = captured.pieces[key]
                    full[start : start + len(values)] = values
                shapes[f"{name}/{key.partition('/')[2]}"] = shape
                parts.append(full)
    together = torch.cat(parts)
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(together)
    found = zip(shapes.items(), together.split([len(part) for part in parts]), strict=True)
    return {key: full.view(shape) for (key, shape), full in found}


def engine_run(
    cell: Cell, steps: range, clipping: float = 0.0, adam: bool = False, poison: Any = None
) -> tuple[Trained, list[tuple[str, ...]]]:
    method = small_method(cell.name)
    sides = engine_sides(method, cell, clipping, adam)
    pools = ImagePools(method.fakes, 0, SEED)
    skipped, gradients = [], {}
    for step in steps:
        batches = micro_batches(method, step, cell.accumulation)
        if poison is not None:
            poison(step, method, batches)
        if cell.precision == "bf16":
            batches = [in_fp32(batch) for batch in batches]
        with ExactForward() if cell.precision == "fp32" else torch.enable_grad():
            seen = step * global_batch(method)
            done = update(method, sides, batches, pools, seed=SEED, number=step, images_seen=seen)
        skipped.append(done.skipped)
        gradients = gradients or whole(sides, "exp_avg" if adam else "momentum_buffer")
    assert replicas.difference(sides) is None
    return Trained(gradients, whole(sides, "param")), skipped


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return largest({key: one[key] - other[key] for key in one})


def largest(tensors: dict[str, Tensor]) -> float:
    """Return the largest magnitude; NaN if there is one, which Python's max would lose."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors.values()]).max())


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the norm of all differences as a share of the other's."""
    return norm({key: one[key] - other[key] for key in other}) / norm(other)


def adams_distance(name: str, ours: Trained, theirs: Trained) -> float:
    """Return how far parameters lie apart at most, in learning rates of their group.

    Adam's step has the size of its rate however small the gradient is. So elements count whose first gradient is no
    rounding next to the largest of its tensor. Where a whole tensor's is, as that of a bias before a norm, it is also
    far below Adam's epsilon, and nothing moves.
    """
    method = small_method(name)
    differences = {}
    for side, groups in method.parameter_groups().items():
        rates = {parameter: group.lr for group in groups for parameter in group.parameters}
        for key, parameter in getattr(method, side).named_parameters():
            key = f"{side}/{key}"
            first = theirs.gradients[key].abs()
            steps = (ours.parameters[key] - theirs.parameters[key]) / rates[parameter]
            differences[key] = steps * (first >= 1e-3 * first.max())
    return largest(differences)


def rank_1_picture_is_nan(step: int, method: Any, batches: list[Any]) -> None:
    if step == BAD and rank_and_world()[0] == 1:
        batches[-1][0][0, 0, 0, 0] = float("nan")


def rank_1_generator_is_nan(what: str, step: int, method: Any, batches: list[Any]) -> None:
    """One term of the loss, or only what is sent back through it, of the update's first micro-batch only."""

    def poisoned(*args: Any) -> dict[str, Tensor]:
        del method.generator_loss  # uncovers the method's own
        terms: dict[str, Tensor] = method.generator_loss(*args)
        if what == "loss":
            return {**terms, "nce_identity": terms["nce_identity"] * float("nan")}
        terms["nce_identity"].register_hook(lambda gradient: gradient * float("nan"))
        return terms

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
        "timer": side.engine.tput_timer.config.enabled,
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
    critics_only = plain_run("cut", range(STEPS), critics_only=frozenset({BAD})).parameters
    for other, steps in (("dropped", {"dropped": frozenset({BAD})}), ("undisturbed", {})):
        results[f"late nan, {other}"] = distance(critics_only, plain_run("cut", range(STEPS), **steps).parameters)
    for case in LATE_NAN_MATRIX:
        poison = functools.partial(rank_1_generator_is_nan, case[0])
        results["late nan", case] = nan_run("cut", *case[1:], poison, critics_only)
    return results


def nan_run(
    name: str, stage: int, accumulation: int, offload: bool, poison: Any, plain: dict[str, Tensor]
) -> tuple[float, list[tuple[str, ...]]]:
    critics_stage = min(stage, 2) if small_method(name).penalised else stage
    cell = Cell(name, stage, critics_stage, "fp32", accumulation, False, offload, False)
    ours, skipped = engine_run(cell, range(STEPS), poison=poison)
    return distance(ours.parameters, plain), skipped


def pool_size(name: str) -> int:
    """A pool takes one fake for each sample, which there are not where samples come in groups."""
    method = small_method(name)
    return global_batch(method) // 2 if method.group == 1 else 0


def resumed(name: str, stage: int, directory: Path) -> dict[str, list[str]]:
    """Train, save, go on in other engines that have restored it, and name the files that differ from going on in these.

    The pools are full after the first update, so what they hold matters. One of the two has its optimizers offloaded.
    """
    half, end, pool = STEPS // 2, STEPS, pool_size(name)
    trainer = Trainer(small_method(name), stage, pool, offload=bool(stage % 2))
    half_name, end_name = (directory_name(steps * trainer.batch) for steps in (half, end))
    trainer.train(0, half)
    assert trainer.save(directory / "whole", half) is None
    trainer.train(half, end)
    assert trainer.save(directory / "whole", end) is None
    trainer = Trainer(small_method(name, seed=7), stage, pool, offload=stage == 2)
    trainer.restore(directory / "whole" / half_name)
    trainer.train(half, end)
    assert trainer.save(directory / "resumed", end) is None
    found = {
        "resumed": differing(directory / "resumed" / end_name, directory / "whole" / end_name),
        "trained": differing(directory / "whole" / half_name, directory / "whole" / end_name),
    }
    barrier()  # nobody goes on to write while another still reads
    return found


def one_method(name: str) -> dict[Any, Any]:
    """Run on every rank: a method's cells, against its plain loops."""
    results: dict[Any, Any] = {}
    steps, start = updates_of(name), plain_run(name, range(0)).parameters
    free = plain_run(name, steps)
    # Half of what a side's first gradient has at the least, so that it is clipped on either.
    sides = [{key: value for key, value in free.gradients.items() if key.startswith(side)} for side in SIDES]
    norms = {False: 0.0, True: min(map(norm, sides)) / 2}
    whole_only = small_method(name).couples_batch

    @functools.cache
    def plain(precision: Precision, pieces: int, clipped: bool) -> Trained:
        if precision == "bf16":
            return autocast_run(name, steps, pieces, norms[clipped])
        return plain_run(name, steps, clipping=norms[True]) if clipped else free

    results[name, "moved"] = [distance(plain("fp32", 1, clipped).parameters, start) for clipped in (False, True)]
    results[name, "clipping"] = distance(free.parameters, plain("fp32", 1, True).parameters)
    for cell in cells_of(name):
        pieces = 2 * cell.accumulation if cell.precision == "bf16" and not whole_only else 1
        theirs = plain(cell.precision, pieces, cell.clipped)
        ours, skipped = engine_run(cell, steps, norms[cell.clipped])
        assert not any(skipped)
        if cell.precision == "bf16":
            moved = {key: theirs.parameters[key] - start[key] for key in start}
            between = apart(ours.parameters, theirs.parameters) * norm(theirs.parameters) / norm(moved)
            results[cell] = (apart(ours.gradients, theirs.gradients), between)
            if not cell.clipped:
                results[name, "fp32 is away"] = apart(free.gradients, theirs.gradients)
        else:
            gradients = distance(ours.gradients, theirs.gradients) / largest(theirs.gradients)
            results[cell] = (gradients, distance(ours.parameters, theirs.parameters))
    theirs = plain_run(name, steps, adam=True)
    for cell in [cell for cell in cells_of(name)[: len(STAGES)] if (name, cell.stage) in ADAM_MATRIX]:
        ours, skipped = engine_run(cell, steps, adam=True)
        assert not any(skipped)
        gradients = distance(ours.gradients, theirs.gradients) / largest(theirs.gradients)
        results[name, cell.stage, "adam"] = (gradients, adams_distance(name, ours, theirs))
    return results


def matrix(directory: str) -> dict[Any, Any]:
    """Run on every rank: all cases."""
    results: dict[Any, Any] = {}
    for name in CASES:
        results |= one_method(name)
    for name, stage in RESUMED_MATRIX:
        results[name, stage, "files"] = resumed(name, stage, Path(directory) / name)
    for name in first_of_each_order():
        dropped = plain_run(name, range(STEPS), dropped=frozenset({BAD})).parameters
        for case in NAN_MATRIX:
            if case[0] == name:
                results["nan", case] = nan_run(*case, rank_1_picture_is_nan, dropped)
    results |= late_nan_matrix()
    for stage in STAGES:
        pairs = zip(bounded_run(stage), bounded_loop(), strict=True)
        results[f"bounded {stage}"] = [float((one - other).abs().max()) for one, other in pairs]
        results[f"drifted {stage}"] = drifted(stage)
    largest_bucket, engines.LARGEST_BUCKET = engines.LARGEST_BUCKET, 900  # elements; some parameters have more
    plain = plain_run("cyclegan", range(STEPS)).parameters
    for stage in STAGES[1:]:
        cell = Cell("cyclegan", stage, stage, "fp32", 2, False, stage == 2, False)
        results[f"small buckets {stage}"] = distance(engine_run(cell, range(STEPS))[0].parameters, plain)
    engines.LARGEST_BUCKET = largest_bucket
    results["deepspeed"] = what_deepspeed_does()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """One pair of rank processes runs the whole matrix."""
    logs, files = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("checkpoints")
    first, second = run_ranks(2, "tests.test_engines:matrix", logs, str(files), timeout=PATIENCE - 20)
    silent = (
        first["deepspeed"].pop("buffer where nobody broadcasts"),
        second["deepspeed"].pop("buffer where nobody broadcasts"),
    )
    assert repr(first) == repr(second), "the ranks disagree"  # as text, since NaN is not even equal to itself
    first["deepspeed"]["buffers where nobody broadcasts"] = silent
    assert isinstance(first, dict)
    return first


# What may lie between loops in bf16: between their first gradients, and between their parameters after the last
# update as a share of how far they moved. A weight that is another one by rounding in fp32 rounds to another number in
# bf16 now and then, and the loops drift apart. Where sums in bf16 have another order it is about twice what was seen.
GRADIENTS, PARAMETERS = 1e-6, 0.05
REORDERED = {"bicyclegan": (0.02, 0.11), "pix2pix": (0.09, 0.2)}


def bounds_in_bf16(cell: Cell) -> tuple[float, float]:
    """Return what may lie between gradients and between parameters.

    The plain loop adds up numbers in bf16 in the engines' order but for two cases. ZeRO 3 puts nodes of its own round
    every layer, so that what several losses send back through one critic, as BicycleGAN's do, is summed in another
    order. And where a batch cannot be cut in pieces, the loop rounds the weights' gradients of all samples together.
    """
    reordered = small_method(cell.name).couples_batch or (
        cell.name == "bicyclegan" and 3 in (cell.stage, cell.critics_stage)
    )
    return REORDERED[cell.name] if reordered else (GRADIENTS, PARAMETERS)


def described(cell: Cell) -> str:
    words = [cell.name, f"zero{cell.stage}{cell.critics_stage}", cell.precision, f"x{cell.accumulation}"]
    return "-".join(words + [word for word in OPTIONS[1:] if getattr(cell, word)])


@pytest.mark.parametrize("cell", CELLS, ids=described)
def test_two_ranks_equal_a_plain_loop(results: dict[Any, Any], cell: Cell) -> None:
    assert min(results[cell.name, "moved"]) > 1e-3  # the loops went somewhere, so the distances below mean something
    gradients, parameters = results[cell]
    if cell.precision == "fp32":
        assert gradients <= 1e-6 and parameters <= 1e-6
    else:
        most = bounds_in_bf16(cell)
        assert gradients <= most[0] and parameters <= most[1]


@pytest.mark.parametrize("name", CASES)
def test_other_loops_are_far_away(results: dict[Any, Any], name: str) -> None:
    """In fp32 one that does not clip, and from the gradients in bf16 those in fp32."""
    assert results[name, "clipping"] > 1e-3
    assert results[name, "fp32 is away"] > 1e5 * GRADIENTS


def test_the_matrix_holds_all_that_the_table_allows() -> None:
    """For either side every stage with every method in each precision, but for what is refused."""

    def allowed(name: str, side: Side, stage: int) -> bool:
        penalised = side == "discriminator" and small_method(name).penalised
        return engines.refusal(Asked(side, stage, penalised=penalised)) is None

    for side, field in (("generator", "stage"), ("discriminator", "critics_stage")):
        asked = {(name, stage) for name in CASES for stage in STAGES if allowed(name, side, stage)}
        for precision in PRECISIONS:
            assert {(cell.name, getattr(cell, field)) for cell in CELLS if cell.precision == precision} == asked
    for cell in CELLS:
        repeats = bool(repeated_blocks(small_method(cell.name).generator))
        engines.check(Asked("generator", cell.stage, cell.offload, recomputed=cell.recomputed, repeats=repeats))


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_meets_every_other_one_at_every_stage_with_several_methods(stage: int) -> None:
    """And each on its own in either precision."""

    def methods(**wanted: Any) -> int:
        fits = [cell for cell in CELLS if all(getattr(cell, key) == value for key, value in wanted.items())]
        return len({cell.name for cell in fits})

    values = {option: (False, True) for option in OPTIONS} | {"accumulation": (1, 2)}
    if stage == 0:
        values["offload"] = (False,)
    for option in OPTIONS:
        for precision, value in itertools.product(PRECISIONS, values[option]):
            assert methods(stage=stage, precision=precision, **{option: value}) >= 2
    for one, other in itertools.combinations(OPTIONS, 2):
        for pair in itertools.product(values[one], values[other]):
            assert methods(stage=stage, **{one: pair[0], other: pair[1]}) >= 2


@pytest.mark.parametrize(("name", "stage"), ADAM_MATRIX)
def test_adam_goes_where_a_plain_loop_goes(results: dict[Any, Any], name: str, stage: int) -> None:
    """Its first gradients and, as a share of the learning rate, the parameters after another update with both sides.

    Seen are 6e-5, which is how far apart fp32 numbers are near 1. Another beta, decay or count of steps shows from 1e-3
    on, and so does ten times the epsilon, but with CycleGAN.
    """
    gradients, parameters = results[name, stage, "adam"]
    assert gradients <= 1e-6
    assert parameters <= 6e-4


@pytest.mark.parametrize(("name", "stage"), RESUMED_MATRIX)
def test_resumed_training_ends_in_the_same_bytes(results: dict[Any, Any], name: str, stage: int) -> None:
    """Weights, moments, averages, buffers, and the pools of both ranks, with and without the optimizers offloaded."""
    found = results[name, stage, "files"]
    pools = ["pool_rank_0000.safetensors", "pool_rank_0001.safetensors"] if pool_size(name) else []
    assert found["trained"] == ["discriminator.safetensors", "generator.safetensors", *pools]
    assert found["resumed"] == []


@pytest.mark.parametrize("case", NAN_MATRIX)
def test_a_nan_on_one_rank_drops_the_update_everywhere(
    results: dict[Any, Any], case: tuple[str, int, int, bool]
) -> None:
    difference, skipped = results["nan", case]
    turns = small_method(case[0]).turns(BAD)
    assert skipped == [(), tuple(side for side in SIDES if side in turns), ()]
    assert difference <= 1e-6


@pytest.mark.parametrize("case", LATE_NAN_MATRIX)
def test_a_nan_in_the_generators_turn_alone_leaves_the_critics_their_step(
    results: dict[Any, Any], case: tuple[str, int, int, bool]
) -> None:
    """Whether the loss has it too or is finite, so that only the gradients tell."""
    assert min(results["late nan, dropped"], results["late nan, undisturbed"]) > 1e-3  # other loops go elsewhere
    difference, skipped = results["late nan", case]
    assert skipped == [(), ("generator",), ()]
    assert difference <= 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bounds_hold_and_decay_is_coupled_after_every_step(results: dict[Any, Any], stage: int) -> None:
    """In the module and in the optimizer's own copy, which would bring back what only the module forgets."""
    after = [step[:5] for step in bounded_loop()]
    assert all(float(rho.min()) == 0.0 and float(rho.max()) == 1.0 for rho in after[:1])  # both bounds are reached
    assert all(difference <= 1e-6 for difference in results[f"bounded {stage}"])


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_parameter_may_be_larger_than_the_bucket(results: dict[Any, Any], stage: int) -> None:
    """As the layer of 268 million elements is in a full U-GAT-IT."""
    assert max(p.numel() for p in small_method("cyclegan").generator.parameters()) > 900
    assert results[f"small buckets {stage}"] <= 1e-6


def test_nothing_is_clipped_that_nobody_asked_to_clip(results: dict[Any, Any]) -> None:
    assert results["deepspeed"]["clipping"] == 0.0
    assert results["deepspeed"]["clipping where a configuration is silent"] == 1.0  # why it is always written


def test_buffers_start_equal_on_all_ranks(results: dict[Any, Any]) -> None:
    assert results["deepspeed"]["buffer"] == [1.0, 1.0]
    assert results["deepspeed"]["buffers where nobody broadcasts"] == ([1.0, 1.0], [2.0, 2.0])


@pytest.mark.parametrize("stage", STAGES)
def test_one_other_bit_on_one_rank_is_found_at_every_stage(results: dict[Any, Any], stage: int) -> None:
    none, buffer, weight = results[f"drifted {stage}"]
    host = socket.gethostname()
    ranks = f"ranks 0 ({host}) and 1 ({host}) differ, and no majority tells which is right"
    assert none is None
    assert buffer == f"the discriminator's memory is not the same on all ranks: {ranks}"
    assert weight == f"the discriminator's slow is not the same on all ranks: {ranks}"


def test_gradient_collectives_follow_the_timeout(results: dict[Any, Any]) -> None:
    assert results["deepspeed"]["timeout"] == 60  # what tests/ranks.py starts with; DeepSpeed's own group has 1800


def test_deepspeed_does_not_wait_for_the_device_to_take_the_time(results: dict[Any, Any]) -> None:
    assert results["deepspeed"]["timer"] is False


def test_learning_rates_follow_the_factor_but_for_their_constant_share(results: dict[Any, Any]) -> None:
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


# --------------------------------------------------------------------------------------- what only GPUs decide


def shown(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Have torch say that there are this many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_a_rank_trains_on_the_gpu_of_its_local_rank_or_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Ranks(1, 2, 1, 2)
    shown(monkeypatch, 0)
    assert engines.device_of(second, {}) == torch.device("cpu")
    shown(monkeypatch, 2)
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}, {"SLURM_LOCALID": "1"}):
        assert engines.device_of(second, environment) == torch.device("cuda", 1)
    shown(monkeypatch, 1)
    for environment in ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}):
        assert engines.device_of(second, environment) == torch.device("cuda", 0)
    assert engines.device_of(Ranks(3, 4, 0, 1), {}) == torch.device("cuda", 0)


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_LOCALID": "0"}])
def test_two_ranks_on_the_only_gpu_are_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchrun starts them inside of a SLURM job too, whose task is not the rank."""
    shown(monkeypatch, 1)
    with pytest.raises(ConfigError, match="2 ranks on this machine, but GPUs to be seen: 1;"):
        engines.device_of(Ranks(1, 2, 1, 2), environment)


def test_deepspeed_is_told_the_device_and_waits_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: this stands in for the process group, and keeps what it would have been told."""
    told: dict[str, str] = {}
    shown(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: told.update(os.environ))
    monkeypatch.setattr(engines.deepspeed_groups, "_WORLD_GROUP", None)
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "1", "SLURM_LOCALID": "1"})
    assert engines.start(Ranks(1, 2, 1, 2), 60) == torch.device("cuda", 0)
    assert told["LOCAL_RANK"] == "0"
    assert 4 * int(told["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) <= 1000


def test_a_gpu_that_emulates_bf16_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all before Ampere do, in many times the time of fp32."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert engines.resolve_precision("auto", device) == engines.resolve_precision("fp32", device) == "fp32"
    with pytest.raises(ValueError, match="Tesla V100 has no bf16"):
        engines.resolve_precision("bf16", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert engines.resolve_precision("auto", device) == engines.resolve_precision("bf16", device) == "bf16"


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, 1.0], [3e38, -3e38]])
def test_a_gradient_that_is_not_finite_is_noticed_once(values: list[float], name: str) -> None:
    """Also one whose values are further apart than fp32 goes; one as large, but on one side of zero, is finite."""
    module = torch.nn.Linear(2, 1, bias=False).to(name)
    watch = engines._Watch(module, torch.device(name))

    def met(gradient: list[float]) -> list[float]:
        """What is said after gradients on both sides of this one, and when asked again."""
        for one in ([1.0, -1.0], gradient, [0.0, -0.0]):
            module(torch.tensor([one], device=name)).sum().backward()
        return [float(watch.take()), float(watch.take())]

    assert met([3e38, 1e38]) == met([-3e38, -1e38]) == [0.0, 0.0]
    assert met(values) == [1.0, 0.0]
    assert met([1.0, 2.0]) == [0.0, 0.0]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_loss_that_is_not_finite_is_noticed(value: float, name: str) -> None:
    watch = engines._Watch(torch.nn.Identity(), torch.device(name))
    watch.loss(torch.tensor(value, device=name))
    assert bool(watch.take()) == (not math.isfinite(value))
