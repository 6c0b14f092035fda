"""The loop: one update after the other, and between them what is due: a line of the log, a checkpoint, samples."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

import torch

from i2i_dist import checkpoint, engine_state
from i2i_dist.assembly import Run
from i2i_dist.data.batch import Batch, LabelledBatch, to_device
from i2i_dist.data.reader import micro_batches
from i2i_dist.distributed import any_rank
from i2i_dist.method import SIDES
from i2i_dist.reporter import Reporter
from i2i_dist.step import Step, update
from i2i_dist.stopping import DONE, STOPPED, StopRequest

_ADVICE = (
    "lower the learning rate, train in fp32, or go back with --resume to an older checkpoint; those in {} hold "
    "finite weights"
)

_log = logging.getLogger("i2i_dist.loop")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


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
        worker_timeout_seconds=run.settings.config.data.worker_timeout_seconds,
        restarted=reporter.note_worker_restart,
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
