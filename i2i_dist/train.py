"""Training from the command line: read the configuration, put the run together, loop, and leave in order."""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2i_dist import __version__, checkpoint, config, engine_state, engines, ops, run_directory
from i2i_dist.agreement import on_every_rank, on_first_rank
from i2i_dist.assembly import Run, Settings, assemble, check_sizes, plan
from i2i_dist.checkpoint import CheckpointError
from i2i_dist.command_line import parse, resume_command
from i2i_dist.config import ConfigError
from i2i_dist.data.batch import Batch, HostBatch, LabelledBatch, to_device
from i2i_dist.data.reader import micro_batches
from i2i_dist.distributed import Ranks, adopt_environment, any_rank, from_first_rank, mean_over_ranks
from i2i_dist.method import SIDES, Gauge, Gauged
from i2i_dist.methods import resolve
from i2i_dist.step import Step, update
from i2i_dist.telemetry.console import Meter, plan_text, progress_line, setup_logging
from i2i_dist.telemetry.jsonl import StatsLog
from i2i_dist.telemetry.prometheus import Metrics, serve
from i2i_dist.telemetry.record import memory_bytes

DONE, FAILED, MISCONFIGURED, STOPPED = 0, 1, 2, 75  # exit codes; 75: stopped early, and can be resumed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# What collectives say on the ranks that are left when another one has ended.
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "Timed out waiting")
_ADVICE = (
    "lower the learning rate, train in fp32, or go back with --resume to an older checkpoint; those in {} hold "
    "finite weights"
)

_log = logging.getLogger("i2i_dist.train")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


class StopRequest:
    """Whether somebody asked the run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set a flag."""

    def __init__(self) -> None:
        self._asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_any_rank(self, device: torch.device) -> bool:
        """Say whether any rank was asked; all ranks get the same answer. Collective."""
        return any_rank(torch.tensor([float(self._asked)], device=device))[0]


class Reporter:
    """Everything a run says while it trains. Rank 0 speaks for all; the others only name their own broken samples."""

    def __init__(self, run: Run) -> None:
        settings, start = run.settings, run.start
        self.meter = Meter(start.images_seen, run.target, start.updates)
        self.rates: dict[str, float] = {}
        self.stats: StatsLog | None = None
        self.metrics: Metrics | None = None
        self._losses: dict[str, tuple[Tensor, int]] = {}  # name -> sum, and updates that computed it
        self._bad = dict.fromkeys(sorted(start.dataset), 0)  # domain -> samples replaced since the last record
        self._named: set[tuple[str, str]] = set()
        self._gauged = run.method if isinstance(run.method, Gauged) else None
        self._low: set[str] = set()  # gauges that were below their lowest at the last record
        self._ranks, self._device, self._server = run.ranks, run.device, None
        if run.ranks.rank:
            return
        self.stats = StatsLog(settings.directory / "stats.jsonl")
        build = {"version": __version__, "torch": torch.__version__, "python": platform.python_version()}
        build |= {f"op_{op}": kind for op, kind in ops.implementations(run.device.type).items()}
        names = {"method": start.config["method"]["name"], "precision": run.layout.precision}
        self.metrics = Metrics(build, names, start.images_seen, run.target)
        if settings.config.output.metrics_port is not None:
            self._server = serve(self.metrics, "127.0.0.1", settings.config.output.metrics_port)

    def note(self, step: Step, images_seen: int) -> None:
        """Take in an update."""
        for name, loss in step.losses.items():
            total, updates = self._losses.get(name, (torch.zeros_like(loss), 0))
            self._losses[name] = (total + loss, updates + 1)
        self.meter.end(images_seen)
        for side in step.skipped if self.metrics is not None else ():
            _log.warning("A loss or gradient is not finite at image %d: the %s's step is dropped.", images_seen, side)
            self.metrics.skipped(side)  # type: ignore[union-attr]

    def note_bad_samples(self, host: HostBatch) -> None:
        """Count the samples that could not be read and were replaced, and name each once."""
        for sample in host.bad:
            self._bad[sample.domain] += 1
            if (sample.domain, sample.key) not in self._named:
                self._named.add((sample.domain, sample.key))
                _log.warning("Replaced sample %s of domain %s: %s.", sample.key, sample.domain, sample.reason)

    def write(self) -> None:
        """Print, append and export what happened since the last time. Collective, for every rank has its share."""
        gauges = self._gauged.gauges() if self._gauged is not None else {}
        means = {name: total / updates for name, (total, updates) in sorted(self._losses.items())}
        watched = [gauge.value for gauge in gauges.values()]
        bad = torch.tensor(list(self._bad.values()), dtype=torch.float32, device=self._device)
        shared = mean_over_ranks(torch.cat([torch.stack([*means.values(), *watched]), bad])).tolist()
        losses = dict(zip(means, shared[: len(means)], strict=True))
        values = dict(zip(gauges, shared[len(means) : -len(bad)], strict=True))
        record = self.meter.record(losses, self.rates, values, memory_bytes())
        replaced = [round(share * self._ranks.world) for share in shared[-len(bad) :]]
        _log.info("%s", progress_line(record))
        if self.stats is not None and self.metrics is not None:
            self.stats.append(record)
            self.metrics.update(record)
            self._warn(gauges, values)
            for domain, number in zip(self._bad, replaced, strict=True):
                for _ in range(number):
                    self.metrics.bad_sample(domain)
        self._losses, self._bad = {}, dict.fromkeys(self._bad, 0)

    def _warn(self, gauges: Mapping[str, Gauge], values: Mapping[str, float]) -> None:
        """Tell of gauges that have fallen below their lowest since the last record."""
        low = {name for name, gauge in gauges.items() if values[name] < gauge.lowest}
        for name in sorted(low - self._low):
            _log.warning("%s is %.2g, below %.2g: %s.", name, values[name], gauges[name].lowest, gauges[name].advice)
        self._low = low

    def close(self) -> None:
        """Stop serving metrics."""
        if self._server is not None:
            self._server.close()


def _batches(run: Run, reporter: Reporter) -> Iterator[list[Batch | LabelledBatch]]:
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


def _finite(run: Run) -> bool:
    """Say whether everything that a checkpoint would hold is finite. Collective."""
    held = [
        piece.values
        for side in SIDES
        for piece in engine_state.capture(
            run.sides[side], run.ema.averages if side == "generator" else {}
        ).pieces.values()
        if piece.values.is_floating_point()
    ]
    largest = torch.stack(torch._foreach_norm(held, float("inf"))) if held else torch.zeros(1, device=run.device)
    return not any_rank((~torch.isfinite(largest)).any().reshape(1))[0]


def _save(run: Run, reporter: Reporter, images_seen: int, updates: int) -> str | None:
    """Write a checkpoint; return None, or why there is none: that is told and counted, and training goes on.

    Raises:
        TrainingError: A weight is not finite, which no later update mends.
    """
    if not _finite(run):
        raise TrainingError(
            f"a weight, average or moment of the optimizer is not finite at image {images_seen}, and no checkpoint of "
            f"it is kept: {_ADVICE.format(run.settings.directory)}"
        )
    begun = time.monotonic()
    directory = run.settings.directory / "checkpoints"
    state = run.start._replace(images_seen=images_seen, updates=updates)
    keep = run.settings.config.output.keep_checkpoints
    reason = checkpoint.save(directory, state, run.sides, run.ema, run.pools, keep)
    if reporter.metrics is None:
        return reason
    if reason is None:
        _log.info("Saved %s.", directory / checkpoint.directory_name(images_seen))
        reporter.metrics.checkpoint_saved(time.monotonic() - begun)
    else:
        _log.error("No checkpoint at image %d: %s. Those before it are kept.", images_seen, reason)
        reporter.metrics.checkpoint_failed()
    return reason


def _sample(run: Run, images_seen: int) -> None:
    """Write a sample grid; a disk that refuses it costs the grid, never the run."""
    try:
        run.sampler.write(run.settings.directory / "samples" / f"{checkpoint.directory_name(images_seen)}.png")
    except OSError as error:
        _log.warning("No sample grid at image %d: %s.", images_seen, error.strerror or error)


def _update(
    run: Run, reporter: Reporter, batches: Iterator[list[Batch | LabelledBatch]], images_seen: int, updates: int
) -> Step:
    reporter.meter.begin()
    with reporter.meter.waiting():
        batch = next(batches)
    factor = run.schedule.factor(images_seen)
    reporter.rates = {
        name: rate for side in run.sides.values() for name, rate in side.set_learning_rate(factor).items()
    }
    train = run.settings.config.train
    pooled = {field: list(images) for field, images in run.pools.images.items()}
    step = update(
        run.method, run.sides, batch, run.pools,
        seed=train.seed, number=updates, images_seen=images_seen,
    )  # fmt: skip
    images_seen += train.global_batch
    if step.skipped:  # fakes that are not finite would come back out of a pool and spoil later updates
        run.pools.images = pooled
    if "generator" not in step.skipped:
        run.ema.update(images_seen, train.global_batch)
    reporter.note(step, images_seen)
    return step


def loop(run: Run, stop: StopRequest, reporter: Reporter) -> int:
    """Train until the target or until asked to stop; return the exit code.

    Raises:
        TrainingError: Numbers stay not finite, or the last checkpoint cannot be written.
    """
    output, train = run.settings.config.output, run.settings.config.train
    images_seen, updates, bad_in_a_row = run.start.images_seen, run.start.updates, 0

    def due(every: int) -> bool:
        return images_seen >= run.target or images_seen // every > (images_seen - train.global_batch) // every

    if not updates:
        _sample(run, images_seen)
    batches = _batches(run, reporter)
    saved, wanted, stopping = updates > 0, False, False
    while images_seen < run.target and not stopping:
        step = _update(run, reporter, batches, images_seen, updates)
        images_seen, updates, saved = images_seen + train.global_batch, updates + 1, False
        bad_in_a_row = bad_in_a_row + 1 if step.skipped else 0
        # Weights that have just met a number that is not finite may be ruined: saving and stopping wait until they
        # have passed an update, or a few saves in a row would push out the last good checkpoint.
        stopping = stop.on_any_rank(run.device) and not bad_in_a_row
        if due(output.log_every_images) or stopping:
            reporter.write()
        if bad_in_a_row >= train.max_bad_updates:
            raise TrainingError(
                f"{bad_in_a_row} updates in a row had a loss or gradient that is not finite, which training does not "
                f"recover from by itself: {_ADVICE.format(run.settings.directory)}"
            )
        wanted = wanted or due(output.checkpoint_every_images)
        if wanted and not (bad_in_a_row or stopping or images_seen >= run.target):
            saved, wanted = _save(run, reporter, images_seen, updates) is None, False
        if due(output.sample_every_images):
            _sample(run, images_seen)
    if not saved and (reason := _save(run, reporter, images_seen, updates)):
        raise TrainingError(
            f"the run is at image {images_seen}, but its last checkpoint could not be written ({reason}); mend that "
            "and start it again: it goes on from the newest checkpoint before"
        )
    return DONE if images_seen >= run.target else STOPPED


def _prepare_process(ranks: Ranks, device: torch.device) -> None:
    """Make runs repeat bit for bit on CPUs, and share a machine's cores among its ranks."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _start_engines(ranks: Ranks, timeout_seconds: int) -> torch.device:
    try:
        return engines.start(ranks, timeout_seconds)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']}, on which the ranks meet, is in use, perhaps by another run; give the "
            "launcher another: --master_port N"
        ) from None


def _take_over(run: Run) -> None:
    """Leave in the run's directory what belongs to the training that starts now, and nothing that comes after it."""
    directory, settings = run.settings.directory, run.settings
    run_directory.write_config(directory, config.dump(settings.config, settings.method_config))
    StatsLog(directory / "stats.jsonl").truncate_after(run.start.images_seen)
    run_directory.set_aside(directory, run.start.images_seen, run.resumed_from)


def _train(options: argparse.Namespace, settings: Settings, ranks: Ranks, arguments: Sequence[str]) -> int:
    stop = StopRequest()
    device = _start_engines(ranks, settings.config.engine.timeout_seconds)
    _prepare_process(ranks, device)
    settings = settings._replace(directory=Path(from_first_rank(str(settings.directory))))
    held = on_first_rank(lambda: run_directory.lock(settings.directory))
    run_directory.check_shared(settings.directory)
    on_every_rank(lambda: setup_logging(ranks.rank, settings.directory))
    logging.raiseExceptions = False  # a full disk must not answer each line of the log with a traceback
    if options.deepspeed_config and ranks.rank == 0:
        _log.warning("--deepspeed_config has no effect: the engines are set by the configuration's section 'engine'.")
    run = assemble(settings, ranks, device, options.resume)
    on_first_rank(lambda: _take_over(run))
    _log.info("%s", plan_text(plan(run)))
    reporter = Reporter(run)
    try:
        code = loop(run, stop, reporter)
    finally:
        reporter.close()
        for worker in multiprocessing.active_children():  # reading processes ignore milder words, see data/reader.py
            worker.kill()
    if code == STOPPED:
        alone = ranks.world == ranks.local_world
        advice = "Resume with" if alone else "Resume with the launcher's own options (hosts, rendezvous) and"
        _log.info("Stopped. %s: %s", advice, resume_command(arguments, settings.directory, ranks))
    else:
        seen = max(run.target, run.start.images_seen)
        _log.info("Done: %d images seen. Run directory: %s", seen, settings.directory)
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
        directory = run_directory.choose(options.run, options.config, options.fresh)
        settings = Settings(loaded, method_class, method_config, directory)
        check_sizes(settings)
        if options.dry_run:
            if rank == 0:
                print(config.dump(loaded, method_config), end="")
            return DONE
        try:
            ranks = adopt_environment(os.environ)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return _train(options, settings, ranks, arguments)
    except (ConfigError, CheckpointError, TrainingError) as error:  # the same on every rank
        if rank == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return MISCONFIGURED if isinstance(error, ConfigError) else FAILED
    except (ValueError, RuntimeError) as error:  # of this rank alone
        text = str(error)
        if any(sign in text for sign in _PEER_IS_GONE):
            text = f"another rank has ended, and this one cannot go on alone ({text.splitlines()[0]})"
        elif not isinstance(error, ValueError):
            raise
        print(f"train.py: rank {rank}: {text}", file=sys.stderr, flush=True)
        return FAILED
