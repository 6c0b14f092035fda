"""Everything of a run that a checkpoint holds, for tests that save and restore."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import torch

from i2i_dist import checkpoint, saver
from i2i_dist.checkpoint import State
from i2i_dist.distributed import rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engines import Layout, Precision, SideEngine
from i2i_dist.method import SIDES
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep
from i2i_dist.step import Sides, update
from tests.methods.cases.common import SEED
from tests.updates import ExactForward, global_batch, in_fp32, micro_batches, stages_of

CPU = torch.device("cpu")


class Trainer:
    """A method with its engines, average and pools."""

    def __init__(
        self,
        method: Any,
        stage: int,
        pool: int,
        precision: Precision = "fp32",
        half_life: int = 10,
        offload: bool = False,
    ) -> None:
        self.method, self.batch = method, global_batch(method)
        _, world = rank_and_world()
        layout = Layout(self.batch // world, 1, world, precision=precision, offload=offload, persistence_threshold=0)
        self.sides: Sides = {
            # With this eps a bias in front of an instance norm, whose gradient is rounding, stays where it is.
            side: SideEngine(
                getattr(method, side), method.parameter_groups()[side], layout._replace(stage=its_stage), CPU,
                eps=1e-3, fused=True,
            )
            for side, its_stage in zip(SIDES, stages_of(method, stage), strict=True)
        }  # fmt: skip
        self.ema = Ema(self.sides["generator"], half_life)
        self.pools = ImagePools(self.method.fakes, pool, SEED)
        self.exact = precision == "fp32"

    def train(self, first: int, after: int) -> None:
        for step in range(first, after):
            batches = micro_batches(self.method, step, 1)
            if not self.exact:
                batches = [in_fp32(batch) for batch in batches]
            with ExactForward() if self.exact else torch.enable_grad():
                update(
                    self.method, self.sides, batches, self.pools,
                    seed=SEED, number=step, images_seen=step * self.batch,
                )  # fmt: skip
            self.ema.update((step + 1) * self.batch, self.batch)

    def state(self, steps: int) -> State:
        return State(steps * self.batch, steps, rank_and_world()[1], {"method": {}}, {}, {})

    def save(self, directory: Path, steps: int, keep: int = 99) -> str | None:
        captured = saver.capture(self.sides, self.ema)
        failure = saver.write(directory, self.state(steps), captured, self.pools, Keep(keep))
        return failure.reason if failure else None

    def restore(self, path: Path) -> State:
        return checkpoint.restore(path, self.sides, self.ema, self.pools, CPU)


def differing(one: Path, other: Path) -> list[str]:
    """Name the tensor files that are not the same bytes in both checkpoints."""
    names = {path.name for path in [*one.glob("*.safetensors"), *other.glob("*.safetensors")]}
    return sorted(
        name
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or not filecmp.cmp(one / name, other / name, shallow=False)
    )
