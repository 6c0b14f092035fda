"""Training from the command line: read the configuration, put the run together, loop, and leave in order."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from i2i_dist import config, engines, plan, run_directory, stacks, supervise
from i2i_dist.agreement import TemporaryError, on_every_rank, on_first_rank
from i2i_dist.assembly import Run, Settings, assemble, check_sizes
from i2i_dist.checkpoint import CheckpointError
from i2i_dist.command_line import parse, resume_command
from i2i_dist.config import ConfigError
from i2i_dist.distributed import Ranks, adopt_environment, barrier, from_first_rank
from i2i_dist.exit_codes import DONE, FAILED, MISCONFIGURED, STOPPED
from i2i_dist.lifeline import Lifeline
from i2i_dist.loop import TrainingError, loop
from i2i_dist.methods import resolve
from i2i_dist.reporter import Reporter
from i2i_dist.stopping import StopRequest
from i2i_dist.telemetry.console import log_path, setup_logging
from i2i_dist.telemetry.jsonl import StatsLog

# What collectives say on the ranks that are left when another one has ended, and when one does not answer.
_PEER_IS_GONE = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
_PEER_IS_SILENT = ("Timed out waiting", "timed out", "wait timeout", "Application timeout")
_LEAVING = 2  # seconds of the timeout that are left for a rank that has waited in vain to write its stacks and end
_log = logging.getLogger("i2i_dist.train")


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
        return engines.start(ranks, max(1, timeout_seconds - _LEAVING))
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise TemporaryError(
            f"port {os.environ['MASTER_PORT']}, on which the ranks meet, is in use, perhaps by another run; give the "
            "launcher another: --master_port N"
        ) from None


def _take_over(run: Run, resume: str) -> None:
    """Leave in the run's directory what belongs to the training that starts now, and nothing that comes after it."""
    directory, settings = run.settings.directory, run.settings
    run_directory.write_config(directory, config.dump(settings.config, settings.method_config))
    StatsLog(directory / "stats.jsonl").truncate_after(run.start.images_seen)
    run_directory.set_aside(directory, run.start.images_seen, run.resumed_from)
    if resume != "auto":
        run_directory.note_going_back(directory, resume, run.start.images_seen)


def _train(
    options: argparse.Namespace,
    settings: Settings,
    ranks: Ranks,
    arguments: Sequence[str],
    launchers: tuple[int, ...],
) -> int:
    stop = StopRequest(launchers)
    device = _start_engines(ranks, settings.config.engine.timeout_seconds)
    stop.together = True
    _prepare_process(ranks, device)
    settings = settings._replace(directory=Path(from_first_rank(str(settings.directory))))
    held = on_first_rank(lambda: run_directory.lock(settings.directory))
    run_directory.check_shared(settings.directory)
    on_every_rank(lambda: setup_logging(ranks.rank, settings.directory))
    if not stop.registered:
        _log.warning("The supervisor above this rank cannot be told of it: it will hand no signal on to this rank.")
    stacks.write_to(log_path(ranks.rank, settings.directory), settings.config.engine.timeout_seconds)
    lifeline = Lifeline(ranks)
    logging.raiseExceptions = False  # a full disk must not answer each line of the log with a traceback
    if options.deepspeed_config and ranks.rank == 0:
        _log.warning("--deepspeed_config has no effect: the engines are set by the configuration's section 'engine'.")
    again = supervise.started_again(os.environ)
    resume = on_first_rank(lambda: run_directory.asked_for(settings.directory, options.resume, again)) or options.resume
    run = assemble(settings, ranks, device, resume)
    on_first_rank(lambda: _take_over(run, resume))
    plan.announce(run)
    reporter = Reporter(run)
    try:
        code = loop(run, stop, reporter)
    finally:
        reporter.close()
        for worker in multiprocessing.active_children():  # reading processes ignore milder words, see data/workers.py
            worker.kill()
    if code == STOPPED:
        if stop.launcher_lost:
            supervise.report_loss()
        alone = ranks.world == ranks.local_world
        advice = "Resume with" if alone else "Resume with the launcher's own options (hosts, rendezvous) and"
        _log.info("Stopped. %s: %s", advice, resume_command(arguments, settings.directory, ranks))
    else:
        seen = max(run.target, run.start.images_seen)
        _log.info("Done: %d images seen. Run directory: %s", seen, settings.directory)
    stacks.leaving()
    lifeline.cut()
    barrier()  # launchers kill what is left soon after the first rank has ended
    engines.stop()
    if held is not None:
        held.close()
    return code


def _explain(error: Exception, rank: int) -> int:
    """Say in one sentence what has ended this rank, write the rest into its log, and return the exit code."""
    if isinstance(error, (ConfigError, TemporaryError, CheckpointError, TrainingError)):  # the same on every rank
        if rank == 0:
            _say(f"train.py: {error}")
        return MISCONFIGURED if isinstance(error, ConfigError) else FAILED
    text, foreseen = _sentence(error)
    sentence = f"train.py: rank {rank}: {text}"
    logged = stacks.write(error, sentence)
    _say(sentence if logged or foreseen else f"{sentence}\n{''.join(traceback.format_exception(error))}")
    return FAILED


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the console may be gone
        print(text, file=sys.stderr, flush=True)


def _sentence(error: Exception) -> tuple[str, bool]:
    """Return what to say of an error of this rank alone, and whether errors of the kind are foreseen."""
    if isinstance(error, ValueError):
        return str(error), True
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    reason = text.partition(". ")[0]
    if isinstance(error, RuntimeError) and any(sign in text for sign in _PEER_IS_SILENT):
        return f"another rank does not answer, and this one cannot go on alone ({reason})", True
    if isinstance(error, RuntimeError) and any(sign in text for sign in _PEER_IS_GONE):
        return f"another rank has ended, and this one cannot go on alone ({reason})", True
    return text, False


def main(arguments: Sequence[str] | None = None, launchers: tuple[int, ...] = ()) -> int:
    """Train; return the exit code: 0 done, 1 error, 2 configuration, 75 stopped early and resumable.

    When one of `launchers`, the processes that have started this one, is gone, the run saves and stops.

    After an error the process is best left at once, with `os._exit`: a collective that has timed out leaves threads
    that may never end.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        code = _run(arguments, rank, launchers)
    except SystemExit as error:  # of the command line's parser, which has said why
        code = error.code if isinstance(error.code, int) else FAILED
    except Exception as error:
        code = _explain(error, rank)
    supervise.report(code)
    return code


def _run(arguments: Sequence[str], rank: int, launchers: tuple[int, ...]) -> int:
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
    return _train(options, settings, ranks, arguments, launchers)
