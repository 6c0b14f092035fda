"""Puts a run together: data, method, engines, averages, and the checkpoint it goes on from."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from i2i_dist import checkpoint, engines, ops, run_directory
from i2i_dist.agreement import on_every_rank
from i2i_dist.checkpoint import CheckpointError, State
from i2i_dist.config import ConfigError, RunConfig
from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.data.folders import open_source
from i2i_dist.data.index import Source
from i2i_dist.data.labels import LabelledSet
from i2i_dist.data.pairs import paired
from i2i_dist.data.reader import Reader
from i2i_dist.data.transforms import Transform
from i2i_dist.distributed import Ranks, from_first_rank, gather_texts
from i2i_dist.draws import Draws
from i2i_dist.ema import Ema
from i2i_dist.engines import Asked, Layout, SideEngine
from i2i_dist.method import SIDES, Gauged, Labelled, Method, Side, Stream
from i2i_dist.pool import ImagePools
from i2i_dist.sampling import Sampler, fixed_inputs
from i2i_dist.schedules import LinearDecay
from i2i_dist.step import Sides

_log = logging.getLogger("i2i_dist.assembly")
T = TypeVar("T")


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
        layout: The batch and precision, which both sides share.
        target: Images seen at the end, a multiple of the global batch.
        start: Where training starts or goes on, with the configuration and data set that checkpoints will carry.
        resumed_from: The checkpoint that it goes on from.
    """

    settings: Settings
    ranks: Ranks
    device: torch.device
    layout: Layout
    schedule: LinearDecay
    target: int
    start: State
    reader: Reader
    method: Method
    sides: Sides
    ema: Ema
    pools: ImagePools
    sampler: Sampler
    resumed_from: Path | None


def check_sizes(settings: Settings) -> None:
    """Try an update with the configuration's crop on the meta device, where nothing is allocated or computed.

    Call it before the process group is there: batch norm and the like then ask no other rank.

    Raises:
        ConfigError: A network cannot take pictures of that size, for which the message is the network's own; or the
            engines are asked for what `engines.REFUSALS` names; or the best checkpoint is asked for by the name of
            something that the method does not log.
    """
    config, crop = settings.config, settings.config.data.crop_size
    method = _sketch(settings)
    _check_multiple(config, method.multiple)
    for side in SIDES:
        engines.check(_asked(config, method, side))
    samples = method.group * min(2, -(-config.train.global_batch // method.group))
    pictures = torch.empty(samples, 3, crop, crop, device="meta")
    logged = set(method.gauges()) if isinstance(method, Gauged) else set()
    try:
        for stream in dict.fromkeys(method.streams):
            batch = _empty_batch(method, stream, pictures)
            with torch.no_grad():
                outputs = method.generator(batch, Draws(0, 0))
                logged |= method.generator_loss(batch, outputs, method.discriminator, 0).keys()
                logged |= method.discriminator_loss(batch, outputs, method.discriminator, 0).keys()
    except ValueError as error:
        raise ConfigError(f"data.crop_size: given {crop}, which does not fit: {error}") from None
    _check_best(config.output.keep_best, sorted(logged))


def _check_best(name: str | None, logged: Sequence[str]) -> None:
    if name is not None and name not in logged:
        nearest = difflib.get_close_matches(name, logged, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise ConfigError(
            f"output.keep_best: given {name!r}, allowed with this method is one of {', '.join(logged)}{hint}"
        )


def _asked(config: RunConfig, method: Method, side: Side) -> Asked:
    """Return what the configuration asks of a side's engine; micro-batches are left to who knows the ranks."""
    generator = side == "generator"
    return Asked(
        side,
        stage=config.engine.generator_stage if generator else config.engine.discriminator_stage,
        offload=config.engine.generator_offload if generator else config.engine.discriminator_offload,
        recomputed=generator and config.engine.checkpoint_activations,
        penalised=not generator and method.penalised,
        coupled=method.couples_batch,
        repeats=bool(engines.repeated_blocks(getattr(method, side))),
    )


def _sketch(settings: Settings) -> Method:
    """Return the method without anything allocated, to be asked what it needs."""
    with torch.device("meta"):
        return settings.method_class(settings.method_config, torch.Generator())


def _empty_batch(method: Method, stream: Stream, pictures: Tensor) -> Batch | LabelledBatch:
    positions = torch.arange(len(pictures))
    if not isinstance(method, Labelled):
        return Batch(pictures, pictures, positions, 0)
    labels = pictures.new_empty(len(pictures), len(method.label_space.attributes)) if stream == "labelled" else None
    return LabelledBatch(pictures, labels, labels, positions, 0)


def _check_multiple(config: RunConfig, multiple: int) -> None:
    """Refuse a crop that the networks cannot halve often enough."""
    crop, load = config.data.crop_size, config.data.load_size
    if crop % multiple:
        fits = max(1, crop // multiple) * multiple
        raise ConfigError(
            f"data.crop_size: given {crop}, allowed with the networks of this method is a multiple of {multiple}; for "
            f"example --set data.crop_size={fits}"
            + (f" --set data.load_size={fits}" if fits > load else "")
            + (", or fewer halvings: --set method.downs=N asks for multiples of 2 ** N" if multiple > 4 else "")
        )


def assemble(settings: Settings, ranks: Ranks, device: torch.device, resume: str) -> Run:
    """Open the data, build both sides under their engines, and restore the checkpoint to go on from. Collective.

    Args:
        settings: What the run is made from.
        ranks: This process among all.
        device: From `engines.start`.
        resume: "auto", or the path of a checkpoint.

    Raises:
        ConfigError, CheckpointError: Something the person who started the run can mend; the same on every rank.
    """
    config, seed = settings.config, settings.config.train.seed
    root = Path(config.data.root)
    sketch = _sketch(settings)
    streams = sketch.streams
    sources = _open(root, streams)
    schedule = _schedule(config, sources)
    precision = on_every_rank(lambda: engines.resolve_precision(config.train.precision, device))
    layout = _layout(config, ranks.world, precision)
    _check_fits(config, sketch, layout)
    on_every_rank(lambda: _check_ops(device))
    found = _agree_on_checkpoint(settings.directory, resume, ranks)
    start = on_every_rank(lambda: _start(settings, sources, found, ranks))

    init = torch.Generator()
    method = settings.method_class(settings.method_config, init.manual_seed(seed))
    replica = settings.method_class(settings.method_config, init.manual_seed(seed)) if ranks.rank == 0 else None
    sides = _engines(config, method, layout, device)
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
    labelled = on_every_rank(lambda: _labelled(method, sources, seed))
    reader = on_every_rank(lambda: Reader(sources, seed=seed, transform=transform, streams=streams, labelled=labelled))
    inputs = on_every_rank(lambda: _sample_inputs(config, sources, "paired" in streams) if ranks.rank == 0 else {})
    return Run(
        settings=settings,
        ranks=ranks,
        device=device,
        layout=layout,
        schedule=schedule,
        target=-(-schedule.total_images // config.train.global_batch) * config.train.global_batch,
        start=start,
        reader=reader,
        method=method,
        sides=sides,
        ema=ema,
        pools=pools,
        sampler=Sampler(replica, sides["generator"], ema, inputs, config.output.sample_styles),
        resumed_from=found,
    )


def _check_ops(device: torch.device) -> None:
    """Refuse, or warn, before any memory is allocated, where I2I_DIST_OPS cannot have what it asks for."""
    try:
        ops.implementations(device.type)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _open(root: Path, streams: Sequence[Stream]) -> dict[str, Source]:
    """Open the domains that the streams are made of, and make sure that every rank sees the same images.

    Those of pairs are in the same order.
    """

    def here() -> dict[str, Source]:
        a = open_source(root, "trainA")
        if "labelled" in streams:
            return {"a": a}
        b = open_source(root, "trainB")
        return {"a": a, "b": paired(a, b) if "paired" in streams else b}

    sources = on_every_rank(here)
    seen = gather_texts(json.dumps([[source.fingerprint, sum(source.counts)] for source in sources.values()]))
    for rank, text in enumerate(seen):
        if text != seen[0]:
            counts = [[count for _, count in json.loads(one)] for one in (seen[0], text)]
            other = ", ".join(f"{count} of {name}" for count, name in zip(counts[1], sources, strict=True))
            raise ConfigError(
                f"data.root {root}: rank {rank} finds other images ({other.replace(' of ', ' of domain ', 1)}) than "
                f"rank 0 ({' and '.join(map(str, counts[0]))}); every machine needs the same data set"
            )
    return sources


def _labelled(method: Method, sources: Mapping[str, Source], seed: int) -> LabelledSet | None:
    """Divide a data set with labels into what the method is told and what not."""
    if not isinstance(method, Labelled):
        return None
    known = sources["a"].labels
    if known is None:
        raise ConfigError(
            f"{sources['a'].name} holds pictures without labels, which this method needs; pack them with their labels: "
            "python launchers/pack.py --help says how"
        )
    labelled = LabelledSet(known, method.label_space, method.labelled_fraction, method.labelled_group, seed)
    _log.info("%d pictures with labels, %d without, %d left out for labels that are not valid.", *labelled.counts)
    if labelled.counts[1] and "unlabelled" not in method.streams:
        _log.warning(
            "The %d pictures without labels are not used: this method, as it is set, has updates with labels only "
            "(MatchGAN uses them with method.unlabelled_turns=true).",
            labelled.counts[1],
        )
    return labelled


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


def _check_fits(config: RunConfig, method: Method, layout: Layout) -> None:
    """Refuse what the method cannot train with."""
    for side in SIDES:
        asked = _asked(config, method, side)
        engines.check(asked._replace(micro_batch=layout.micro_batch, accumulation=layout.accumulation))
    if layout.micro_batch % method.group:
        key = "train.micro_batch" if config.train.micro_batch else "train.global_batch"
        given = config.train.micro_batch or config.train.global_batch
        fits = -(-layout.micro_batch // method.group) * method.group
        raise ConfigError(
            f"{key}: given {given}, but this method puts {method.group} consecutive samples together; the batch of "
            f"each rank and pass must be a multiple of {method.group}, for example "
            f"--set train.global_batch={fits * layout.accumulation * layout.world}"
            + (f" --set train.micro_batch={fits}" if config.train.micro_batch else "")
        )


def _engines(config: RunConfig, method: Method, layout: Layout, device: torch.device) -> Sides:
    sides: Sides = {}
    for side in SIDES:
        asked = _asked(config, method, side)
        spread = layout._replace(stage=asked.stage, offload=asked.offload, recomputed=asked.recomputed)
        sides[side] = SideEngine(getattr(method, side), method.parameter_groups()[side], spread, device)
    return sides


def _agree_on_checkpoint(directory: Path, resume: str, ranks: Ranks) -> Path | None:
    """Let rank 0 verify what is there, so that files are hashed once, and tell every rank what came of it."""
    kinds: dict[str, type[ValueError]] = {"config": ConfigError, "checkpoint": CheckpointError}
    kind, answer = "", ""
    if ranks.rank == 0:
        try:
            answer = str(run_directory.find_checkpoint(directory, resume) or "")
        except ConfigError as error:
            kind, answer = "config", str(error)
        except CheckpointError as error:
            kind, answer = "checkpoint", str(error)
    kind, _, answer = from_first_rank(f"{kind}:{answer}").partition(":")
    if kind:
        raise kinds[kind](answer)
    return Path(answer) if answer else None


def _start(settings: Settings, sources: Mapping[str, Source], found: Path | None, ranks: Ranks) -> State:
    dataset = {domain: source.fingerprint for domain, source in sources.items()}
    resolved = settings.resolved()
    if found is None:
        return State(0, 0, ranks.world, resolved, dataset, {})
    saved = run_directory.check_same_run(found, resolved, dataset, settings.method_class.ARCHITECTURE)
    for side in SIDES:
        checkpoint.side_file(found, side)  # a rank that cannot read it says so now, before others wait for it
    batch = settings.config.train.global_batch
    if saved.images_seen % batch:
        raise ConfigError(
            f"train.global_batch: given {batch}, allowed is a divisor of the {saved.images_seen} images seen at {found}"
        )
    return saved._replace(world=ranks.world, config=resolved)


def _sample_inputs(config: RunConfig, training: Mapping[str, Source], pairs: bool) -> dict[str, Tensor]:
    """Take the pictures of sample grids from testA and testB where they can be read, else from the training images."""
    count, size, root = config.output.sample_images, config.data.crop_size, Path(config.data.root)
    inputs: dict[str, Tensor] = {}
    for domains in [list(training)] if pairs else [[domain] for domain in training]:
        try:
            sources = {domain: open_source(root, f"test{domain.upper()}") for domain in domains}
            if pairs:
                sources["b"] = paired(sources["a"], sources["b"])
            inputs |= fixed_inputs(sources, count, size)
        except ValueError as error:
            named, reason = " and ".join(domains), str(error).splitlines()[0]
            _log.warning("Sample grids show training images of domain %s, for %s", named, reason)
            inputs |= fixed_inputs({domain: training[domain] for domain in domains}, count, size)
    return inputs
