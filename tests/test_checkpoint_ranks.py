"""What is saved at one ZeRO stage and world size is restored at any other byte for byte, and training goes on the same.

Three launches, of one rank, of two and of four, run side by side: each trains and saves at every stage, waits until the
others have too, restores what they have saved at stages of its own, saves again, and trains on.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from i2i_dist import publishing, saver
from i2i_dist.checkpoint import directory_name, newest_verified, verify
from i2i_dist.distributed import any_rank, barrier, gather_texts, rank_and_world
from i2i_dist.engines import Precision
from i2i_dist.method import SIDES
from i2i_dist.retention import Keep
from i2i_dist.saver import Saver
from tests.methods.cases.common import GLOBAL_BATCH
from tests.ranks import run_ranks
from tests.trainer import CPU, Trainer, differing
from tests.updates import small_method

PATIENCE = 700.0  # seconds; quiet it is a tenth of that
pytestmark = pytest.mark.timeout(800)

# The pools of two ranks are full after four updates and exchange in the fifth, so what they hold matters from there on;
# pools that start empty are not full within two updates, on one rank either, so there the number of ranks changes
# nothing.
POOL, BEFORE, AFTER = 8, 5, 2
STAGES, WORLDS = range(4), (1, 2, 4)
# From two ranks to two and to one from any stage to any other; else each stage to another one each time.
CASES = list(itertools.product((2,), STAGES, (1, 2), STAGES))
MOVES = ((1, 1), (1, 2), (4, 2), (4, 1), (2, 4), (1, 4))
CASES += [(world, stage, now, (stage + move) % 4) for move, (world, now) in enumerate(MOVES) for stage in STAGES]
# Ranks and stage of one leg after the other, of an update each: the rounding of sums over other ranks grows with them.
CHAIN = ((4, 3), (2, 1), (1, 2), (4, 0))
SLOW: list[tuple[int, Any, str]] = [(1, os, "pwrite"), (0, publishing, "create")]  # rank, and what its disk is slow in


class Counting(Trainer):
    """A small CycleGAN with a counter among the generator's buffers."""

    def __init__(
        self,
        stage: int,
        seed: int,
        precision: Precision = "fp32",
        half_life: int = 10,
        pool: int = POOL,
        offload: bool = False,
    ) -> None:
        method = small_method("cyclegan", seed, width=3, critic_width=3, lr=2e-3)
        method.generator.register_buffer("passes", torch.tensor(1000 * seed))  # int64, no dimension
        method.generator.register_buffer("seen", torch.full((2, 3), float(seed)))
        method.generator.register_forward_pre_hook(self.count)
        super().__init__(method, stage, pool, precision, half_life, offload)

    @staticmethod
    def count(module: nn.Module, _: Any) -> None:
        module.passes += 1
        module.seen += 0.5

    def empty_pools(self) -> None:
        self.pools.restore({}, CPU)


def saved(root: Path, world: int, stage: int, what: str = "kept") -> Path:
    return root / f"world_{world}_stage_{stage}" / what


BEFORE_NAME, AFTER_NAME = directory_name(BEFORE * GLOBAL_BATCH), directory_name((BEFORE + AFTER) * GLOBAL_BATCH)


def train_and_save(root: Path, stage: int) -> None:
    """Save, go on, and save what came of it: with the pools as they are, and with pools that start empty."""
    _, world = rank_and_world()
    trainer = Counting(stage, seed=0, offload=stage > 0 and (stage + world) % 2 == 0)
    trainer.train(0, BEFORE)
    assert trainer.save(saved(root, world, stage), BEFORE) is None
    trainer.train(BEFORE, BEFORE + AFTER)
    assert trainer.save(saved(root, world, stage), BEFORE + AFTER) is None
    trainer = Counting(stage, seed=0)
    trainer.train(0, BEFORE)
    trainer.empty_pools()
    trainer.train(BEFORE, BEFORE + AFTER)
    assert trainer.save(saved(root, world, stage, "emptied"), BEFORE + AFTER) is None
    if stage == 0 and world == 1:  # here the modules hold everything, so the files can be compared with them
        sides = trainer.sides.items()
        weights = {
            f"{side}/{name}": p.detach() for side, engine in sides for name, p in engine.module.named_parameters()
        }
        torch.save(weights, root / "weights.pt")


def restore_and_go_on(root: Path, world: int, stage: int, stage_now: int, warnings: list[str]) -> dict[str, Any]:
    rank, world_now = rank_and_world()
    source, own = saved(root, world, stage) / BEFORE_NAME, root / f"again_{world_now}"
    if rank == 0:
        shutil.rmtree(own, ignore_errors=True)
    barrier()
    # With an optimizer that was offloaded and is not now, the other way round, and neither.
    trainer = Counting(stage_now, seed=7, offload=stage_now > 0 and (stage + world + stage_now) % 2 == 0)
    if (stage + stage_now) % 2:
        trainer.train(0, 1)  # engines that have stepped on other weights must forget them
    warnings.clear()
    state = trainer.restore(source)
    assert trainer.save(own, BEFORE) is None
    trainer.train(BEFORE, BEFORE + AFTER)
    assert trainer.save(own, BEFORE + AFTER) is None
    if rank != 0:
        return {}
    aim = saved(root, world, stage, "kept" if world == world_now else "emptied") / AFTER_NAME
    return {
        "state": (state.images_seen, state.updates, state.world),
        "files differ": differing(own / BEFORE_NAME, source),
        "numbers": numbers(own / BEFORE_NAME) == numbers(source),
        "later files differ": differing(own / AFTER_NAME, aim),
        "later numbers": numbers(own / AFTER_NAME) == numbers(aim),
        "distance": distance(own / AFTER_NAME, aim),
        "warnings": list(warnings),
    }


def numbers(path: Path) -> Any:
    return json.loads((path / "state.json").read_text())["optimizer"]


def distance(one: Path, other: Path) -> float:
    """Return the largest difference of any parameter, moment, average or buffer."""
    differences: list[Tensor] = []
    for side in SIDES:
        ours, theirs = load_file(one / f"{side}.safetensors"), load_file(other / f"{side}.safetensors")
        assert ours.keys() == theirs.keys()
        differences += [ours[key].double() - theirs[key].double() for key in ours]
    return largest(differences)


def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude; NaN if there is one, which Python's max would lose."""
    return float(torch.stack([tensor.detach().abs().max() for tensor in tensors]).max())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other launch has not written {path}")
        time.sleep(0.05)


class Noted(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def matrix(directory: str) -> dict[Any, Any]:
    """Run on every rank of either launch."""
    root, (rank, world_now) = Path(directory), rank_and_world()
    warnings: list[str] = []
    logging.getLogger("i2i_dist.checkpoint").addHandler(Noted(warnings))
    for stage in STAGES:
        train_and_save(root, stage)
    barrier()
    if rank == 0:
        (root / f"sources_{world_now}").touch()
    for world in WORLDS:
        wait_for(root / f"sources_{world}")
    results: dict[Any, Any] = {}
    for world, stage, now, stage_now in CASES:
        if now == world_now:
            results[world, stage, now, stage_now] = restore_and_go_on(root, world, stage, stage_now, warnings)
    chain(root)
    if world_now == 2:
        for slow, owner, name in SLOW:
            results["beside", name] = beside(root / f"beside_{name}", slow, owner, name)
        results["bf16"] = bf16(root / "bf16")
        results["no average"] = average_switched_on(root)
        results["before the first update"] = before_the_first_update(root / "first")
        results["faults"] = faults(root / "faults")
    return results


def chain(root: Path) -> None:
    """Go from one number of ranks and stage to the next, and on one rank the whole way without a stop."""
    rank, world_now = rank_and_world()
    for leg, (world, stage) in enumerate(CHAIN):
        if world == world_now:
            trainer = Counting(stage, seed=7 if leg else 0, pool=0)
            if leg:
                wait_for(root / f"leg_{leg - 1}")
                trainer.restore(root / "chain" / directory_name(leg * GLOBAL_BATCH))
            trainer.train(leg, leg + 1)
            assert trainer.save(root / "chain", leg + 1) is None
            if rank == 0:
                (root / f"leg_{leg}").touch()
    if world_now == 1:
        trainer = Counting(0, seed=0, pool=0)
        trainer.train(0, len(CHAIN))
        assert trainer.save(root / "without_a_stop", len(CHAIN)) is None


def beside(directory: Path, slow: int, owner: Any, name: str) -> dict[str, Any]:
    """Write while training goes on, with a function of a rank's disk so slow that three updates pass."""
    (rank, _), trainer, steps = rank_and_world(), Counting(1, seed=0), 6
    trainer.train(0, BEFORE)
    assert trainer.save(directory / "waiting", BEFORE) is None
    mine, go, real = Saver(directory / "beside", Keep(9), CPU), threading.Event(), getattr(owner, name)
    if rank == slow:
        setattr(owner, name, lambda *arguments: real(*arguments) if go.wait(PATIENCE) else 0)
    mine.begin(trainer.state(BEFORE), saver.capture(trainer.sides, trainer.ema), trainer.pools, time.monotonic())
    meanwhile = []
    for step in range(BEFORE, BEFORE + steps):
        trainer.train(step, step + 1)
        if step == BEFORE + 3:
            go.set()
        mine.advance(*any_rank(torch.tensor(mine.flags)))
        meanwhile.append((mine.busy, newest_verified(directory / "beside")[0] is not None))
    outcome = mine.finish()
    setattr(owner, name, real)
    path = directory / "beside" / BEFORE_NAME
    verify(path)
    return {
        "meanwhile": meanwhile[:3],
        "failure": outcome and outcome.failure,
        "files differ": differing(path, directory / "waiting" / BEFORE_NAME),
        "numbers": numbers(path) == numbers(directory / "waiting" / BEFORE_NAME),
    }


def bf16(directory: Path) -> dict[str, Any]:
    """Save under autocast at one stage, restore at two."""
    trainer = Counting(2, seed=0, precision="bf16")
    trainer.train(0, BEFORE)
    assert trainer.save(directory, BEFORE) is None
    trainer.train(BEFORE, BEFORE + AFTER)
    assert trainer.save(directory, BEFORE + AFTER) is None
    found = {}
    for stage in (2, 3):
        again = Counting(stage, seed=7, precision="bf16")
        again.restore(directory / BEFORE_NAME)
        own = directory.with_name(f"bf16_{stage}")
        assert again.save(own, BEFORE) is None
        again.train(BEFORE, BEFORE + AFTER)
        assert again.save(own, BEFORE + AFTER) is None
        found[stage] = (
            differing(own / BEFORE_NAME, directory / BEFORE_NAME),
            differing(own / AFTER_NAME, directory / AFTER_NAME),
        )
    return found


def average_switched_on(root: Path) -> dict[str, Any]:
    """Save without an average, go on with one: it starts at the weights; and the replica is filled with it."""
    trainer = Counting(1, seed=0, half_life=0)
    trainer.train(0, 1)
    assert trainer.save(root / "no_average", 1) is None
    path = root / "no_average" / directory_name(GLOBAL_BATCH)
    again = Counting(3, seed=7)
    again.restore(path)
    stored = load_file(path / "generator.safetensors")
    rank, _ = rank_and_world()
    found = {"ema in the file": sum(key.startswith("ema/") for key in stored)}
    for name, ema in (("off", trainer.ema), ("on", again.ema)):
        replica = Counting(0, seed=3).method.generator if rank == 0 else (Counting(0, seed=3) and None)
        ema.load_into(replica)
        if replica is not None:
            found[name] = largest(p - stored[f"param/{key}"] for key, p in replica.named_parameters())
    return found


def before_the_first_update(directory: Path) -> list[str]:
    trainer = Counting(1, seed=0)
    assert trainer.save(directory, 0) is None
    again = Counting(2, seed=7)
    again.restore(directory / directory_name(0))
    assert again.save(directory.with_name("first_again"), 0) is None
    again.train(0, 1)
    trainer.train(0, 1)
    assert again.save(directory.with_name("first_again"), 1) is None
    assert trainer.save(directory, 1) is None
    pairs = [(directory / directory_name(n), directory.with_name("first_again") / directory_name(n)) for n in (0, 4)]
    return [name for pair in pairs for name in differing(*pair)]


# --------------------------------------------------------------------------------------------- full disks, on two ranks

FAULTS: list[tuple[int, Any, str, int]] = [  # rank that meets it, function, which call of it
    (0, Path, "mkdir", 0), (0, Path, "open", 0), (0, os, "pwrite", 0), (1, os, "pwrite", 0), (1, os, "pwrite", 9),
    (1, os, "fsync", 1), (1, Path, "open", 0), (0, os, "fsync", 0), (0, os, "fsync", 3), (0, os, "rename", 0),
]  # fmt: skip


@contextmanager
def disk_full(owner: Any, name: str, at: int) -> Iterator[None]:
    function, calls = getattr(owner, name), itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


def faults(directory: Path) -> list[Any]:
    rank, _ = rank_and_world()
    trainer = Counting(1, seed=0)
    trainer.train(0, 1)
    assert trainer.save(directory, 1) is None
    found = []
    for failing, owner, name, at in FAULTS:
        if rank == failing:
            with disk_full(owner, name, at):
                reason = trainer.save(directory, 2, keep=1)
        else:
            reason = trainer.save(directory, 2, keep=1)
        left = sorted(path.name for path in directory.iterdir())
        verified = newest_verified(directory)
        reasons = gather_texts(str(reason))
        found.append((reasons, left, verified[0] == directory / directory_name(GLOBAL_BATCH), list(verified[1])))
        barrier()
    found.append(trainer.save(directory, 3, keep=1))
    verify(directory / directory_name(3 * GLOBAL_BATCH))
    return found


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where both launches save: in memory if there is such a place, since a disk's flushes take their time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("checkpoints")
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def results(root: Path) -> dict[Any, Any]:
    answers: dict[int, Any] = {}

    def launch(world: int) -> None:
        logs = root / f"logs_{world}"
        logs.mkdir()
        try:
            function = "tests.test_checkpoint_ranks:matrix"
            answers[world] = run_ranks(world, function, logs, str(root), timeout=PATIENCE)[0]
        except AssertionError as error:
            answers[world] = error

    launches = [threading.Thread(target=launch, args=(world,)) for world in WORLDS]
    for one in launches:
        one.start()
    for one in launches:
        one.join()
    for answer in answers.values():
        if isinstance(answer, AssertionError):
            raise answer
    return answers[1] | answers[2] | answers[4]


@pytest.mark.parametrize(("world", "stage", "world_now", "stage_now"), CASES)
def test_restored_anywhere_it_is_the_same(
    results: dict[Any, Any], world: int, stage: int, world_now: int, stage_now: int
) -> None:
    case = results[world, stage, world_now, stage_now]
    assert case["state"] == (BEFORE * GLOBAL_BATCH, BEFORE, world)
    assert case["numbers"]
    assert case["later numbers"]
    if world == world_now:
        assert case["files differ"] == []  # sides and pools
        assert case["warnings"] == []
        if stage == stage_now:
            assert case["later files differ"] == []
    else:
        assert [name for name in case["files differ"] if not name.startswith("pool_")] == []
        assert case["warnings"] == [
            f"The checkpoint was written by {world} ranks and there are {world_now} now: the image pools start empty."
        ]
    assert case["distance"] <= 1e-6


def test_from_four_ranks_to_two_to_one_and_back(results: dict[Any, Any], root: Path) -> None:
    """With training in between, at another stage each time, it comes out where one rank does that never stopped."""
    steps = len(CHAIN)
    ended, whole = (root / name / directory_name(steps * GLOBAL_BATCH) for name in ("chain", "without_a_stop"))
    assert numbers(ended) == numbers(whole)
    assert distance(ended, whole) <= 1e-6
    assert distance(root / "chain" / directory_name((steps - 1) * GLOBAL_BATCH), whole) > 1e-3


@pytest.mark.parametrize("name", [name for _, _, name in SLOW])
def test_training_goes_on_while_a_rank_waits_for_its_disk(results: dict[Any, Any], name: str) -> None:
    found = results["beside", name]
    assert found["meanwhile"] == [(True, False)] * 3  # under way, and nothing published
    assert found["failure"] is None
    assert found["files differ"] == [] and found["numbers"]


def test_the_runs_above_could_have_told(results: dict[Any, Any], root: Path) -> None:
    """Training moves the weights, the average differs from them, and what the pools hold changes what follows."""
    before, after = (saved(root, 2, 0) / name for name in (BEFORE_NAME, AFTER_NAME))
    emptied = saved(root, 2, 0, "emptied") / AFTER_NAME
    assert distance(before, after) > 1e-3
    ours, theirs = (load_file(path / "discriminator.safetensors") for path in (after, emptied))
    assert largest(ours[key] - theirs[key] for key in ours) > 1e-4
    stored = load_file(before / "generator.safetensors")
    averages = {key: value for key, value in stored.items() if key.startswith("ema/")}
    assert len(averages) == sum(key.startswith("param/") for key in stored) > 10
    assert largest(value - stored[f"param/{key[4:]}"] for key, value in averages.items()) > 1e-4
    assert len(load_file(before / "pool_rank_0001.safetensors")["fake_a"]) == POOL


def test_buffers_are_saved_in_their_own_dtype(results: dict[Any, Any], root: Path) -> None:
    stored = load_file(saved(root, 2, 3) / AFTER_NAME / "generator.safetensors")
    assert stored["buffer/passes"].dtype == torch.int64
    assert stored["buffer/passes"].shape == ()
    assert stored["buffer/passes"].item() == BEFORE + AFTER
    assert torch.equal(stored["buffer/seen"], torch.full((2, 3), 0.5 * (BEFORE + AFTER)))


def test_files_hold_the_weights_of_the_modules(results: dict[Any, Any], root: Path) -> None:
    weights: dict[str, Tensor] = torch.load(root / "weights.pt", weights_only=True)
    for stage in STAGES:  # on one rank; what two wrote is read on one rank above
        for side in SIDES:
            stored = load_file(saved(root, 1, stage, "emptied") / AFTER_NAME / f"{side}.safetensors")
            mine = {key.partition("/")[2]: value for key, value in weights.items() if key.startswith(side)}
            assert {key[6:] for key in stored if key.startswith("param/")} == mine.keys()
            for name, value in mine.items():
                assert stored[f"param/{name}"].shape == value.shape
                assert torch.allclose(stored[f"param/{name}"], value, rtol=0, atol=1e-6)


def test_autocast_to_bf16_changes_nothing_about_it(results: dict[Any, Any]) -> None:
    assert results["bf16"][2] == ([], [])
    assert results["bf16"][3][0] == []


def test_an_average_may_be_switched_on_later(results: dict[Any, Any]) -> None:
    assert results["no average"] == {"ema in the file": 0, "off": 0.0, "on": 0.0}


def test_nothing_has_happened_yet_is_a_state_too(results: dict[Any, Any]) -> None:
    assert results["before the first update"] == []


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"rank{r}-{n}-{at}" for r, _, n, at in FAULTS])
def test_a_disk_full_on_one_rank_is_known_to_all(results: dict[Any, Any], number: int) -> None:
    reasons, left, old_one_is_good, skipped = results["faults"][number]
    assert reasons == [f"rank {FAULTS[number][0]}: No space left on device"] * 2
    assert left == [directory_name(GLOBAL_BATCH), "latest"]
    assert old_one_is_good
    assert skipped == []


def test_after_full_disks_a_save_works(results: dict[Any, Any]) -> None:
    assert results["faults"][-1] is None
