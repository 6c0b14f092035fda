"""The loop: one update after the other, and between them what is due: a line of the log, a checkpoint, samples."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from i2i_dist import checkpoint, replicas, saver, stacks
from i2i_dist.assembly import Run
from i2i_dist.data.batch import Batch, LabelledBatch, to_device
from i2i_dist.data.reader import micro_batches
from i2i_dist.distributed import any_rank
from i2i_dist.exit_codes import DONE, STOPPED
from i2i_dist.plan import kept
from i2i_dist.reporter import Reporter
from i2i_dist.retention import Scores
from i2i_dist.saver import NOT_FINITE, Outcome, Saver
from i2i_dist.step import Step, update
from i2i_dist.stopping import StopRequest
from i2i_dist.telemetry.bad_updates import FILE_NAME

_ADVICE = (
    "lower the learning rate, train in fp32, or go back with --resume to an older checkpoint; those in {} hold "
    "finite weights"
)

_log = logging.getLogger("i2i_dist.loop")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


class _Share(NamedTuple):
    """This rank's micro-batches of an update, on the device, and by domain the keys of their samples."""

    batches: list[Batch | LabelledBatch]
    keys: dict[str, list[str]]


def _shares(run: Run, reporter: Reporter) -> Iterator[_Share]:
    """Yield this rank's share of each update."""
    hosts = micro_batches(
        run.reader,
        global_batch=run.settings.config.train.global_batch,
        micro_batch=run.layout.micro_batch,
        rank=run.ranks.rank,
        world=run.ranks.world,
        start=run.start.images_seen,
        stop=run.target,
        workers=run.settings.config.data.workers,
        worker_timeout_seconds=run.settings.config.data.worker_timeout_seconds,
        restarted=reporter.note_worker_restart,
    )
    while part := list(itertools.islice(hosts, run.layout.accumulation)):
        for host in part:
            reporter.note_bad_samples(host)
        keys = {domain: [key for host in part for key in host.keys[domain]] for domain in part[0].keys}
        yield _Share([to_device(host, run.device) for host in part], keys)


class _Checkpoints:
    """The run's checkpoints: begun between two updates, written beside those that follow; what is said of each."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self._run, self._reporter = run, reporter
        self._directory = run.settings.directory / "checkpoints"
        patience = run.settings.config.engine.timeout_seconds
        self._saver = Saver(self._directory, kept(run.settings.config), run.device, patience)
        self._scores = Scores()
        self.newest = run.start.images_seen if run.start.updates else None  # images seen of it

    def write_log(self) -> None:
        """Write a record, from which the next checkpoint's scores are made. Collective."""
        record = self._reporter.write()
        self._scores.note(record.losses | record.gauges, len(record.update_seconds))

    @property
    def ready(self) -> bool:
        """Whether a checkpoint can be begun: one is written at a time."""
        return not self._saver.busy

    def begin(self, images_seen: int, updates: int) -> None:
        """Begin a checkpoint. Collective.

        Raises:
            TrainingError: A weight is not the same on all ranks, which no later update mends.
        """
        begun, run = time.monotonic(), self._run
        _check_replicas(run, images_seen)
        state = run.start._replace(images_seen=images_seen, updates=updates, scores=self._scores.take())
        self._saver.begin(state, saver.capture(run.sides, run.ema), run.pools, begun)

    def stop_asked(self, stop: StopRequest, images_seen: int) -> bool:
        """Exchange the flags of an update: move a checkpoint on, say whether any rank is asked to stop. Collective.

        A GPU has done all of the update when they are there, and not before; so this is where its time ends.
        All ranks end for the launcher that one of them has lost, and say so to their supervisors: each starts again.

        Raises:
            TrainingError: In the checkpoint a weight is not finite, which no later update mends.
        """
        own = [stop.asked, stop.launcher_lost, *self._saver.flags]
        asked, lost, *flags = any_rank(torch.tensor(own, device=self._run.device))
        if lost:  # never taken back: this rank may have noticed its own loss meanwhile
            stop.launcher_lost = True
        self._reporter.meter.end(images_seen)
        self._tell(self._saver.advance(*flags))
        return asked

    def finish(self) -> str | None:
        """Wait for the checkpoint under way; return why it is not on the disk, or None. Collective.

        Raises:
            TrainingError: See `stop_asked`.
        """
        outcome = self._saver.finish()
        self._tell(outcome)
        return outcome.failure.reason if outcome is not None and outcome.failure is not None else None

    def leave(self) -> None:
        """Let a checkpoint that all ranks have written be published, where the run ends for an error of one rank."""
        self._saver.leave()

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.failure is None:
            self.newest = outcome.images_seen
        elif outcome.failure.kind == NOT_FINITE:
            raise TrainingError(
                f"a weight, average or moment of the optimizer is not finite at image {outcome.images_seen} "
                f"({outcome.failure.reason}), and no checkpoint of it is kept: "
                f"{_ADVICE.format(self._run.settings.directory)}"
            )
        metrics = self._reporter.metrics
        if metrics is None:
            return
        if outcome.failure is None:
            path = self._directory / checkpoint.directory_name(outcome.images_seen)
            told = "Saved %s. It took %.2f s, and training stood still for %.2f s of them."
            _log.info(told, path, outcome.seconds, outcome.paused)
            metrics.checkpoint_saved(outcome.seconds, outcome.paused)
        else:
            told = "No checkpoint at image %d: %s. Those before it are kept."
            _log.error(told, outcome.images_seen, outcome.failure.reason)
            metrics.checkpoint_failed(outcome.failure.kind, outcome.paused)


def _sample(run: Run, images_seen: int) -> None:
    """Write a sample grid; a disk that refuses it costs the grid, never the run."""
    try:
        run.sampler.write(run.settings.directory / "samples" / f"{checkpoint.directory_name(images_seen)}.png")
    except OSError as error:
        _log.warning("No sample grid at image %d: %s.", images_seen, error.strerror or error)


def _check_replicas(run: Run, images_seen: int) -> None:
    """Make sure that what all ranks hold alike is the same on all of them. Collective.

    Raises:
        TrainingError: It is not.
    """
    if reason := replicas.difference(run.sides):
        raise TrainingError(
            f"at image {images_seen} {reason}. A fault of that machine's memory, device or link is likely, or other "
            "software on it: take it out and start again. Training then goes on from the newest checkpoint, before "
            "which all ranks were found the same"
        )


def _update(run: Run, reporter: Reporter, shares: Iterator[_Share], images_seen: int, updates: int) -> Step:
    reporter.begin()
    with reporter.meter.waiting():
        share = next(shares)
    factor = run.schedule.factor(images_seen)
    reporter.rates = {
        name: rate for side in run.sides.values() for name, rate in side.set_learning_rate(factor).items()
    }
    train = run.settings.config.train
    pooled = {field: list(images) for field, images in run.pools.images.items()}
    step = update(
        run.method, run.sides, share.batches, run.pools,
        seed=train.seed, number=updates, images_seen=images_seen,
    )  # fmt: skip
    images_seen += train.global_batch
    if step.skipped:  # fakes that are not finite would come back out of a pool and spoil later updates
        run.pools.images = pooled
    if "generator" not in step.skipped:
        run.ema.update(images_seen, train.global_batch)
    reporter.note(step, updates, images_seen, share.batches[-1])
    if step.skipped:
        reporter.note_skipped(step, updates, images_seen, share.keys)
    return step


def loop(run: Run, stop: StopRequest, reporter: Reporter) -> int:
    """Train until the target or until asked to stop; return the exit code.

    Raises:
        TrainingError: Numbers stay not finite, or the last checkpoint cannot be written.
    """
    checkpoints = _Checkpoints(run, reporter)
    try:
        images_seen, updates = _train(run, stop, reporter, checkpoints)
        reason = checkpoints.finish()
        if checkpoints.newest != images_seen:
            if checkpoints.ready:  # else a disk hangs
                checkpoints.begin(images_seen, updates)
                reason = checkpoints.finish()
            if reason:
                raise TrainingError(
                    f"the run is at image {images_seen}, but its last checkpoint could not be written ({reason}); mend "
                    "that and start it again: it goes on from the newest checkpoint before"
                )
    except TrainingError:  # the same on all ranks
        checkpoints.finish()
        raise
    finally:
        checkpoints.leave()
    return DONE if images_seen >= run.target else STOPPED


def _train(run: Run, stop: StopRequest, reporter: Reporter, checkpoints: _Checkpoints) -> tuple[int, int]:
    """Make updates until the target or until asked to stop; return the images seen, and the number of updates."""
    output, train = run.settings.config.output, run.settings.config.train
    images_seen, updates, bad_in_a_row = run.start.images_seen, run.start.updates, 0

    def due(every: int) -> bool:
        return images_seen >= run.target or images_seen // every > (images_seen - train.global_batch) // every

    if not updates:
        _sample(run, images_seen)
    shares = _shares(run, reporter)
    wanted, stopping = False, False
    while images_seen < run.target and not stopping:
        stacks.alive()
        step = _update(run, reporter, shares, images_seen, updates)
        images_seen, updates = images_seen + train.global_batch, updates + 1
        bad_in_a_row = bad_in_a_row + 1 if step.skipped else 0
        # Weights that have just met a number that is not finite may be ruined: saving and stopping wait until they
        # have passed an update, or a few saves in a row would push out the last good checkpoint.
        stopping = checkpoints.stop_asked(stop, images_seen) and not bad_in_a_row
        if train.drift_every_updates and updates % train.drift_every_updates == 0:
            _check_replicas(run, images_seen)
        if due(output.log_every_images) or stopping:
            checkpoints.write_log()
        if bad_in_a_row >= train.max_bad_updates:
            raise TrainingError(
                f"{bad_in_a_row} updates in a row had a loss or gradient that is not finite, which training does not "
                f"recover from by itself; {FILE_NAME} names the samples: {_ADVICE.format(run.settings.directory)}"
            )
        wanted = wanted or due(output.checkpoint_every_images)
        if wanted and checkpoints.ready and not (bad_in_a_row or stopping or images_seen >= run.target):
            checkpoints.begin(images_seen, updates)
            wanted = False
        if due(output.sample_every_images):
            _sample(run, images_seen)
    return images_seen, updates
