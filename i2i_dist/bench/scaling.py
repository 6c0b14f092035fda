"""Measures a configuration's update on 1, 2, 4 ranks of this machine, and predicts it on many GPUs: `bench.py scaling`.

What is predicted is a model (`cost_model.py`), and every table of it says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import socket
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from i2i_dist.bench.collectives import Noted, shares
from i2i_dist.bench.cost_model import GPUS, Call, Link, predict_here, sent, traffic
from i2i_dist.bench.facts import device_kind
from i2i_dist.bench.scaling_rank import Done, Job, Report, serve
from i2i_dist.bench.scaling_tables import measured_text, predicted_text
from i2i_dist.bench.timing import spread
from i2i_dist.bench.update_counts import Counts, count, sketch
from i2i_dist.config import ConfigError, RunConfig, load
from i2i_dist.engines import resolve_precision
from i2i_dist.method import SIDES, Method, Side
from i2i_dist.methods import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench.py scaling`."""

    def worlds(text: str) -> list[int]:
        found = sorted({int(part) for part in text.split(",")})
        if found[0] < 1:
            raise argparse.ArgumentTypeError(f"given {text}, allowed are numbers from 1 on, as in 1,2,4")
        return sorted({1, *found})  # what the others are compared with

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"given {text}, allowed is 1 or more")
        return int(text)

    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="whose update")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change one key of it"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="what the model predicts (default: h100)")
    parser.add_argument(
        "--ranks", type=worlds, default=[1, 2, 4], metavar="N,N", help="measured on this machine (default: 1,2,4)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="measured updates of each kind (default: 5)")
    parser.add_argument(
        "--limit", type=positive, default=600, help="seconds after which a number of ranks is given up (default: 600)"
    )
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="also write everything to a file there")


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables and return the exit status: 2 for a configuration that cannot be used."""
    try:
        result = measure(options)
    except (ConfigError, RuntimeError) as error:
        print(f"bench.py scaling: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(measured_text(result))
    print(predicted_text(result, GPUS[options.gpu]))
    if options.json is not None:
        target = options.json / f"{options.config.stem}.{result['kind']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is measured and counted.

    Raises:
        ConfigError: The configuration cannot be used.
        RuntimeError: A rank failed; the message says how.
    """
    if options.json is not None and not options.json.is_dir():
        raise ConfigError(f"--json: given {options.json}, allowed is a folder that is there; make it first")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and max(options.ranks) > torch.cuda.device_count():
        raise ConfigError(f"--ranks: given {max(options.ranks)}, allowed here is at most {torch.cuda.device_count()}")
    config = load(options.config, options.settings)
    method_class, method_config = resolve(config.method)
    method = sketch(method_class, method_config)
    job = _job(config, method, device, options.rounds)
    try:
        counts = count(method_class, method_config, method.group, job.size)
    except ValueError as error:
        raise ConfigError(f"data.crop_size: given {job.size}, which does not fit: {error}") from None
    worlds, stages, rate = list[dict[str, Any]](), list[dict[str, Any]](), 0.0
    for world in options.ranks:
        # What the other stages send is counted once, where there is somebody to send it to.
        others = _other_stages(job, method) if world > 1 and not stages else []
        reports = on_ranks(world, [job, *others], options.limit)
        rate = rate or reports[0].product_rate
        worlds.append(summary(world, reports, worlds[0]["seconds"] if worlds else None))
        stages += [
            compared(other, counts, world, reports[0].done[place].noted)
            for place, other in enumerate([job, *others] if others else [])
        ]
        print(f"{world} ranks: {worlds[-1]['seconds']:.3g} s for an update", file=sys.stderr, flush=True)
    return {
        "command": "python launchers/bench.py " + shlex.join(sys.argv[1:]),
        "kind": device_kind(device),
        "machine": reports[0].facts | {"processors": processors()},
        "config": options.config.name,
        "method": method_config.model_dump(mode="json"),
        "size": job.size,
        "batch": job.batch,
        "stages": dict(job.stages),
        "product_rate": rate,
        "worlds": worlds,
        "traffic": stages,
        "counts": counts.as_json(),
    }


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def _job(config: RunConfig, method: Method, device: torch.device, rounds: int) -> Job:
    """Give every rank what one GPU takes at once: the micro-batch, or all of the global batch."""
    batch = config.train.micro_batch or config.train.global_batch
    if batch % method.group:
        raise ConfigError(
            f"train.global_batch: given {batch}, all of which each rank takes here; allowed with this method is a "
            f"multiple of {method.group}"
        )
    try:
        precision = resolve_precision(config.train.precision, device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    stages: dict[Side, int] = {
        "generator": config.engine.generator_stage,
        "discriminator": config.engine.discriminator_stage,
    }
    return Job(config.method, config.data.crop_size, batch, stages, precision, rounds)


def _other_stages(job: Job, method: Method) -> list[Job]:
    most = {"generator": 3, "discriminator": 2 if method.penalised else 3}
    found = [{side: min(stage, most[side]) for side in SIDES} for stage in range(4)]
    return [job._replace(stages=stages, rounds=0) for stages in found if stages != job.stages]


def on_ranks(world: int, jobs: Sequence[Job], limit: int) -> list[Report]:
    """Let `world` ranks on this machine do the jobs, and return what each has to say.

    Raises:
        RuntimeError: A rank failed, or said nothing for `limit` seconds.
    """
    # On CPUs ranks are forked from a process that has the imports behind it and has never computed. CUDA forbids that.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload([serve.__module__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=serve, args=(theirs, rank, world, port, jobs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    reports = []
    try:
        for rank, pipe in enumerate(pipes):
            reports.append(_received(pipe, rank, limit))
    finally:
        for process in processes:
            process.join(timeout=10 if len(reports) == world else 0)
            process.kill()
            process.join()
    return reports


def _received(pipe: Connection, rank: int, limit: int) -> Report:
    try:
        if not pipe.poll(limit):
            raise RuntimeError(f"rank {rank} had no answer within {limit} seconds; take a smaller size, or --limit")
        report: Report = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError(f"rank {rank} ended without an answer, as when the machine's memory is used up") from None
    if report.failure is not None:
        raise RuntimeError(f"rank {rank}: {report.failure}")
    return report


def summary(world: int, reports: Sequence[Report], alone: float | None) -> dict[str, Any]:
    """Return what was measured with `world` ranks: the step, its parts, and what the model says of it.

    `alone` are the seconds of the update on one rank, or None if these are they.
    """
    firsts = [report.done[0] for report in reports]
    parts = [_parts(update, firsts) for update in range(len(firsts[0].noted))]
    seconds = spread([max(times) for times in zip(*(done.seconds for done in firsts), strict=True)])
    found = {
        "world": world,
        "seconds": seconds["median"],
        "spread": seconds,
        "parts": {name: statistics.fmean(one[name] for one in parts) for name in parts[0]},
        "calls": [call._asdict() for call in counted(firsts[0].noted)],
    }
    if alone is not None:
        links = {kind: link_of(times, kind, world) for kind, times in reports[0].probes.items()}
        found["links"] = {kind: link._asdict() for kind, link in links.items()}
        found["predicted"] = predict_here(alone, counted(firsts[0].noted), world, processors(), links)
    return found


def _parts(update: int, ranks: Sequence[Done]) -> dict[str, float]:
    """Take an update apart: means over the ranks, in seconds."""
    found = shares([done.noted[update] for done in ranks])
    mean = statistics.fmean
    whole, on_a_core = mean(done.apart[update] for done in ranks), mean(done.on_a_core[update] for done in ranks)
    communicating, waiting = mean(one.communicating for one in found), mean(one.waiting for one in found)
    outside = whole - communicating - waiting
    return {
        "whole": whole,
        "computing": min(on_a_core, outside),
        "without a processor": max(0.0, outside - on_a_core),
        "communicating": communicating,
        "waiting": waiting,
    }


def counted(updates: Sequence[Sequence[Noted]]) -> list[Call]:
    """Return the collectives of a mean update."""
    alike = Counter((one.kind, one.bytes) for update in updates for one in update)
    return [Call(kind, size, calls / len(updates)) for (kind, size), calls in alike.items()]


def compared(job: Job, counts: Counts, world: int, updates: Sequence[Sequence[Noted]]) -> dict[str, Any]:
    """Return the calls and bytes of an update as counted and by the formula, by kind of collective."""

    def sums(calls: Sequence[Call]) -> dict[str, dict[str, float]]:
        kinds = sorted({call.kind for call in calls})
        of_kind = {kind: [call for call in calls if call.kind == kind] for kind in kinds}
        return {
            kind: {"calls": sum(c.calls for c in some), "bytes": sum(c.calls * c.bytes for c in some)}
            for kind, some in of_kind.items()
        }

    formula = traffic(counts, job.stages, world, job.threshold)
    return {"stages": dict(job.stages), "world": world, "counted": sums(counted(updates)), "formula": sums(formula)}


def link_of(times: Mapping[int, float], kind: str, world: int) -> Link:
    """Return latency and rate from the seconds of a small and a large collective, by their bytes."""
    small, large = min(times), max(times)
    rate = sent(Call(kind, large - small, 1), world) / max(times[large] - times[small], 1e-9)
    return Link(times[small], rate)
