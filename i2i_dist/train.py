"""Training from the command line: read the configuration, put the run together, loop, and leave in order."""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2i_dist import __version__, checkpoint, config, engines, ops, run_directory
from i2i_dist.assembly import Run, Settings, assemble
from i2i_dist.checkpoint import CheckpointError
from i2i_dist.config import ConfigError
from i2i_dist.data.batch import Batch, HostBatch, to_device
from i2i_dist.data.reader import micro_batches
from i2i_dist.distributed import Ranks, adopt_environment, any_rank, from_first_rank, mean_over_ranks
from i2i_dist.methods import resolve
from i2i_dist.step import Step, update
from i2i_dist.telemetry.console import Meter, Plan, plan_text, progress_line, setup_logging
from i2i_dist.telemetry.jsonl import StatsLog
from i2i_dist.telemetry.prometheus import Metrics, serve
from i2i_dist.telemetry.record import memory_bytes

DONE, FAILED, MISCONFIGURED, STOPPED = 0, 1, 2, 75  # exit codes; 75: stopped early, and can be resumed

# What people type by habit from other trainers, and what it is called here.
_HABITS = {
    "dataroot": "data.root", "load_size": "data.load_size", "crop_size": "data.crop_size", "workers": "data.workers",
    "batch_size": "train.global_batch", "batch": "train.global_batch", "seed": "train.seed",
    "n_epochs": "schedule.constant_epochs", "n_epochs_decay": "schedule.decay_epochs", "model": "method.name",
    "lr": "method.lr", "lambda_NCE": "method.lambda_nce", "pool_size": "method.pool_size",
    "num_threads": "data.workers", "mixed_precision": "train.precision",
}  # fmt: skip

_log = logging.getLogger("i2i_dist.train")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


class StopRequest:
    """Whether somebody asked the run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set a flag."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_any_rank(self, device: torch.device) -> bool:
        """Say whether any rank was asked; all ranks get the same answer. Collective."""
        return any_rank(torch.tensor([float(self._asked)], device=device))[0]


class Reporter:
    """Everything a run says while it trains; only rank 0 has one that speaks."""

    def __init__(self, run: Run) -> None:
        settings, start = run.settings, run.start
        self.meter = Meter(start.images_seen, run.target, start.updates)
        self.losses: dict[str, Tensor] = {}
        self.updates_since = 0
        self.rates: dict[str, float] = {}
        self.stats: StatsLog | None = None
        self.metrics: Metrics | None = None
        self._server = None
        if run.ranks.rank:
            return
        self.stats = StatsLog(settings.directory / "stats.jsonl")
        self.stats.truncate_after(start.images_seen)
        build = {"version": __version__, "torch": torch.__version__, "python": platform.python_version()}
        names = {"method": start.config["method"]["name"], "precision": run.layout.precision}
        self.metrics = Metrics(build, names, start.images_seen, run.target)
        if settings.config.output.metrics_port is not None:
            self._server = serve(self.metrics, "127.0.0.1", settings.config.output.metrics_port)

    def note(self, step: Step, images_seen: int) -> None:
        """Take in an update."""
        for name, loss in step.losses.items():
            self.losses[name] = self.losses[name] + loss if name in self.losses else loss
        self.updates_since += 1
        self.meter.end(images_seen, {})
        for side in step.skipped:
            _log.warning("A loss or gradient is not finite at image %d: the %s's step is dropped.", images_seen, side)
            if self.metrics is not None:
                self.metrics.skipped(side)

    def note_bad_samples(self, host: HostBatch) -> None:
        """Name the samples that could not be read and were replaced."""
        for sample in host.bad:
            _log.warning("Replaced sample %s of domain %s: %s.", sample.key, sample.domain, sample.reason)
            if self.metrics is not None:
                self.metrics.bad_sample(sample.domain)

    def write(self) -> None:
        """Print, append and export the means since the last time. Collective, for the losses are every rank's."""
        names = sorted(self.losses)
        means = mean_over_ranks(torch.stack([self.losses[name] for name in names]) / self.updates_since).tolist()
        record = self.meter.record(self.rates, memory_bytes())
        record = record._replace(losses=dict(zip(names, means, strict=True)))
        self.losses, self.updates_since = {}, 0
        _log.info("%s", progress_line(record))
        if self.stats is not None and self.metrics is not None:
            self.stats.append(record)
            self.metrics.update(record)

    def close(self) -> None:
        """Stop serving metrics."""
        if self._server is not None:
            self._server.close()


def _batches(run: Run, reporter: Reporter) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each update, on the device."""
    hosts = micro_batches(
        run.reader,
        global_batch=run.settings.config.train.global_batch,
        micro_batch=run.layout.micro_batch,
        rank=run.ranks.rank,
        world=run.ranks.world,
        start=run.start.images_seen,
        stop=run.target,
        workers=run.settings.config.data.workers,
    )
    while part := list(itertools.islice(hosts, run.layout.accumulation)):
        for host in part:
            reporter.note_bad_samples(host)
        yield [to_device(host, run.device) for host in part]


def _same(batches: Sequence[Batch], stream: str) -> Sequence[Batch]:
    return batches


def _save(run: Run, reporter: Reporter, images_seen: int, updates: int) -> None:
    """Write a checkpoint; a failure is told and counted, and training goes on."""
    begun = time.monotonic()
    directory = run.settings.directory / "checkpoints"
    state = run.start._replace(images_seen=images_seen, updates=updates)
    keep = run.settings.config.output.keep_checkpoints
    reason = checkpoint.save(directory, state, run.sides, run.ema, run.pools, keep)
    if reason is None:
        _log.info("Saved %s.", directory / checkpoint.directory_name(images_seen))
        if reporter.metrics is not None:
            reporter.metrics.checkpoint_saved(time.monotonic() - begun)
        return
    _log.error("No checkpoint at image %d: %s. Training goes on; the checkpoints before are kept.", images_seen, reason)
    if reporter.metrics is not None:
        reporter.metrics.checkpoint_failed()


def loop(run: Run, stop: StopRequest) -> int:
    """Train until the target or until asked to stop; return the exit code."""
    reporter, output, train = Reporter(run), run.settings.config.output, run.settings.config.train
    images_seen, updates, bad_in_a_row = run.start.images_seen, run.start.updates, 0
    saved_at = images_seen if updates else None
    samples = run.settings.directory / "samples"

    def due(every: int) -> bool:
        return images_seen >= run.target or images_seen // every > (images_seen - train.global_batch) // every

    if not updates:
        run.sampler.write(samples / "images_000000000000.png")
    batches = _batches(run, reporter)
    stopping = False
    while images_seen < run.target and not stopping:
        reporter.meter.begin()
        with reporter.meter.waiting():
            batch = next(batches)
        factor = run.schedule.factor(images_seen)
        reporter.rates = {
            name: rate for side in run.sides.values() for name, rate in side.set_learning_rate(factor).items()
        }
        step = update(
            run.method, run.sides, functools.partial(_same, batch), run.pools,
            seed=train.seed, number=updates, images_seen=images_seen,
        )  # fmt: skip
        images_seen, updates = images_seen + train.global_batch, updates + 1
        if "generator" not in step.skipped:
            run.ema.update(images_seen, train.global_batch)
        bad_in_a_row = bad_in_a_row + 1 if step.skipped else 0
        reporter.note(step, images_seen)
        stopping = stop.on_any_rank(run.device)
        if due(output.log_every_images) or stopping:
            reporter.write()
        if bad_in_a_row >= train.max_bad_updates:
            raise TrainingError(
                f"{bad_in_a_row} updates in a row had a loss or gradient that is not finite, which training does not "
                "recover from by itself: lower the learning rate or train in fp32; the checkpoints in "
                f"{run.settings.directory} hold good weights"
            )
        if due(output.sample_every_images):
            run.sampler.write(samples / f"{checkpoint.directory_name(images_seen)}.png")
        if due(output.checkpoint_every_images) or stopping:
            _save(run, reporter, images_seen, updates)
            saved_at = images_seen
    if saved_at != images_seen:
        _save(run, reporter, images_seen, updates)
    reporter.close()
    return DONE if images_seen >= run.target else STOPPED


def plan(run: Run) -> Plan:
    """Return what the run is about to do."""
    networks = {
        name: sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        for side in run.sides.values()
        for name, module in side.module.named_children()
    }
    info = ops.build_info()
    return Plan(
        method=f"{run.start.config['method']['name']} ({run.start.config['method']['preset']})",
        run_directory=run.settings.directory,
        device=run.device.type,
        nodes=max(1, run.ranks.world // run.ranks.local_world),
        ranks=run.ranks.world,
        micro_batch=run.layout.micro_batch,
        accumulation=run.layout.accumulation,
        parameters=networks,
        images_seen=run.start.images_seen,
        target_images=run.target,
        updates=run.target // run.settings.config.train.global_batch,
        precision=run.layout.precision,
        zero_stages={side: engine.layout.stage for side, engine in run.sides.items()},
        ops_backend=", ".join(info["cuda" if run.device.type == "cuda" else "cpu"]) or "reference",
    )


def resume_command(arguments: Sequence[str], local_world: int) -> str:
    """Return the command that goes on with this run, in the words it was started with."""
    kept = [argument for argument in arguments if not argument.startswith("--local_rank") and argument != "--fresh"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", f"--nproc_per_node={local_world}"]
    elif "CROSS_RANK" in os.environ:
        launcher = ["deepspeed", f"--num_gpus={local_world}"]
    elif "SLURM_PROCID" in os.environ:
        launcher = ["srun", "python"]
    else:
        launcher = ["python"]
    return shlex.join([*launcher, sys.argv[0], *kept])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: An option that is not known, with its name here where it is a habit from another trainer.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train an image-to-image translation GAN.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change one key"
    )
    parser.add_argument(
        "--run", metavar="DIR", help="the run's directory (default: runs/ and the configuration's name)"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|CHECKPOINT", help="where to go on from (default: auto)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over in a new directory beside the run's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    options, unknown = parser.parse_known_args(arguments)
    unknown = [argument for argument in unknown if not argument.startswith("--deepspeed")]
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        value = value or (unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "VALUE")
        hint = f"write --set {_HABITS[name]}={value}" if name in _HABITS else "see --help; all else is --set KEY=VALUE"
        raise ConfigError(f"{unknown[0]} is not an option here; {hint}")
    return options


def _prepare_process(ranks: Ranks, device: torch.device) -> None:
    """Make runs repeat bit for bit on CPUs, and share a machine's cores among its ranks."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _train(options: argparse.Namespace, settings: Settings, ranks: Ranks, arguments: Sequence[str]) -> int:
    stop = StopRequest()
    device = engines.start(ranks, settings.config.engine.timeout_seconds)
    _prepare_process(ranks, device)
    problem, held = "", None
    if ranks.rank == 0:
        try:
            held = run_directory.lock(settings.directory)
            run_directory.write_config(settings.directory, config.dump(settings.config, settings.method_config))
        except ConfigError as error:
            problem = str(error)
    if problem := from_first_rank(problem):
        raise ConfigError(problem)
    setup_logging(ranks.rank, settings.directory)
    run = assemble(settings, ranks, device, options.resume)
    _log.info("%s", plan_text(plan(run)))
    code = loop(run, stop)
    if code == STOPPED:
        _log.info("Stopped. Resume with: %s", resume_command(arguments, ranks.local_world))
    else:
        _log.info("Done: %d images seen. Run directory: %s", run.target, settings.directory)
    engines.stop()
    if held is not None:
        held.close()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code: 0 done, 1 error, 2 configuration, 75 stopped early and resumable."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        options = parse(arguments)
        loaded = config.load(options.config, options.settings)
        method_class, method_config = resolve(loaded.method)
        if options.dry_run:
            if rank == 0:
                print(config.dump(loaded, method_config), end="")
            return DONE
        ranks = adopt_environment(os.environ)
        directory = run_directory.choose(options.run, options.config, options.fresh)
        return _train(options, Settings(loaded, method_class, method_config, directory), ranks, arguments)
    except (ConfigError, CheckpointError, TrainingError, ValueError) as error:
        code = MISCONFIGURED if isinstance(error, ConfigError) else FAILED
        if rank == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return code
