"""Puts a run together: data, method, engines, averages, and the checkpoint it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from i2i_dist import checkpoint, engines, run_directory
from i2i_dist.checkpoint import CheckpointError, State
from i2i_dist.config import ConfigError, RunConfig
from i2i_dist.data.folders import open_source
from i2i_dist.data.index import Source
from i2i_dist.data.reader import UnpairedReader
from i2i_dist.data.transforms import Transform
from i2i_dist.distributed import Ranks, from_first_rank
from i2i_dist.ema import Ema
from i2i_dist.engines import Layout, SideEngine
from i2i_dist.method import SIDES, Method
from i2i_dist.pool import ImagePools
from i2i_dist.sampling import Sampler, fixed_inputs
from i2i_dist.schedules import LinearDecay
from i2i_dist.step import Sides


class Settings(NamedTuple):
    """What a run is made from: the configuration, with the method's section validated, and where it writes."""

    config: RunConfig
    method_class: type[Method]
    method_config: BaseModel
    directory: Path

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration as plain data, every default filled in."""
        return self.config.model_dump(mode="json") | {"method": self.method_config.model_dump(mode="json")}


class Run(NamedTuple):
    """Everything the loop works with.

    Attributes:
        layout: How the generator's side is spread; the discriminator's differs in its ZeRO stage alone.
        target: Images seen at the end, a multiple of the global batch.
        start: Where training starts or goes on, with the configuration and data set that checkpoints will carry.
    """

    settings: Settings
    ranks: Ranks
    device: torch.device
    layout: Layout
    schedule: LinearDecay
    target: int
    start: State
    reader: UnpairedReader
    method: Method
    sides: Sides
    ema: Ema
    pools: ImagePools
    sampler: Sampler


def assemble(settings: Settings, ranks: Ranks, device: torch.device, resume: str) -> Run:
    """Open the data, build both sides under their engines, and restore the checkpoint to go on from. Collective.

    Args:
        settings: What the run is made from.
        ranks: This process among all.
        device: From `engines.start`.
        resume: "auto", or the path of a checkpoint.

    Raises:
        ConfigError, CheckpointError, ValueError: Something the person who started the run can mend.
    """
    config, seed = settings.config, settings.config.train.seed
    root = Path(config.data.root)
    sources = {domain: open_source(root, f"train{domain.upper()}") for domain in ("a", "b")}
    schedule = _schedule(config, sources)
    layout = _layout(config, ranks.world, engines.resolve_precision(config.train.precision, device))
    found = _agree_on_checkpoint(settings.directory, resume, ranks)
    start = _start(settings, sources, found, ranks)

    init = torch.Generator()
    method = settings.method_class(settings.method_config, init.manual_seed(seed))
    replica = settings.method_class(settings.method_config, init.manual_seed(seed)) if ranks.rank == 0 else None
    groups = method.parameter_groups()
    stages = {"generator": config.engine.generator_stage, "discriminator": config.engine.discriminator_stage}
    sides: Sides = {
        side: SideEngine(getattr(method, side), groups[side], layout._replace(stage=stages[side]), device)
        for side in SIDES
    }
    ema = Ema(sides["generator"], config.train.ema_half_life_images)
    pools = ImagePools(method.fakes, method.pool_size, seed)
    if found is not None:
        checkpoint.restore(found, sides, ema, pools, device)

    transform = Transform(
        load_size=config.data.load_size,
        crop_size=config.data.crop_size,
        flip=config.data.flip,
        full_size_from=None if config.data.decay_jitter else schedule.decay_starts,
    )
    inputs = fixed_inputs(_sample_sources(root, sources), config.output.sample_images, config.data.crop_size)
    return Run(
        settings=settings,
        ranks=ranks,
        device=device,
        layout=layout,
        schedule=schedule,
        target=-(-schedule.total_images // config.train.global_batch) * config.train.global_batch,
        start=start,
        reader=UnpairedReader(sources, seed=seed, transform=transform),
        method=method,
        sides=sides,
        ema=ema,
        pools=pools,
        sampler=Sampler(replica, sides["generator"], ema, inputs),
    )


def _schedule(config: RunConfig, sources: Mapping[str, Source]) -> LinearDecay:
    return LinearDecay(
        config.schedule.epoch_images or max(sum(source.counts) for source in sources.values()),
        config.schedule.constant_epochs,
        config.schedule.decay_epochs,
        config.schedule.decay_step,
    )


def _layout(config: RunConfig, world: int, precision: engines.Precision) -> Layout:
    """Work out micro x accumulation x world = global."""
    batch = config.train.global_batch
    if batch % world:
        raise ConfigError(
            f"train.global_batch: given {batch}, allowed on {world} ranks is a multiple of {world}; for example "
            f"--set train.global_batch={-(-batch // world) * world}"
        )
    share = batch // world
    micro = config.train.micro_batch or share
    if share % micro:
        divisors = ", ".join(str(number) for number in range(1, share + 1) if share % number == 0)
        raise ConfigError(
            f"train.micro_batch: given {micro}, allowed is a divisor of global_batch / ranks = {share}: {divisors}"
        )
    clipping = config.engine.gradient_clipping
    return Layout(micro, share // micro, world, clipping=clipping, precision=precision)


def _agree_on_checkpoint(directory: Path, resume: str, ranks: Ranks) -> Path | None:
    """Let rank 0 verify what is there, so that files are hashed once, and tell every rank what came of it."""
    answer = ""
    if ranks.rank == 0:
        try:
            answer = str(run_directory.find_checkpoint(directory, resume) or "")
        except CheckpointError as error:
            answer = f"error: {error}"
    answer = from_first_rank(answer)
    if answer.startswith("error: "):
        raise CheckpointError(answer.removeprefix("error: "))
    return Path(answer) if answer else None


def _start(settings: Settings, sources: Mapping[str, Source], found: Path | None, ranks: Ranks) -> State:
    dataset = {domain: source.fingerprint for domain, source in sources.items()}
    resolved = settings.resolved()
    if found is None:
        return State(0, 0, ranks.world, resolved, dataset)
    saved = run_directory.check_same_run(found, resolved, dataset)
    batch = settings.config.train.global_batch
    if saved.images_seen % batch:
        raise ConfigError(
            f"train.global_batch: given {batch}, allowed is a divisor of the {saved.images_seen} images seen at {found}"
        )
    return saved._replace(world=ranks.world, config=resolved)


def _sample_sources(root: Path, training: Mapping[str, Source]) -> dict[str, Source]:
    """Take the pictures of sample grids from testA and testB where there are any, else from the training images."""
    sources = dict(training)
    for domain in sources:
        if (root / f"test{domain.upper()}").is_dir():
            sources[domain] = open_source(root, f"test{domain.upper()}")
    return sources
