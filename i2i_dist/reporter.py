"""What a run says while it trains: the log, stats.jsonl, and Prometheus."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping

import torch
from torch import Tensor

from i2i_dist import __version__, ops
from i2i_dist.assembly import Run
from i2i_dist.data.batch import HostBatch
from i2i_dist.distributed import mean_over_ranks
from i2i_dist.method import Gauge, Gauged
from i2i_dist.step import Step
from i2i_dist.telemetry.console import Meter, progress_line
from i2i_dist.telemetry.jsonl import StatsLog
from i2i_dist.telemetry.prometheus import Metrics, serve
from i2i_dist.telemetry.record import memory_bytes

_log = logging.getLogger("i2i_dist.reporter")


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
        self._worker_restarts = 0  # since the last record
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

    def note_worker_restart(self) -> None:
        """Count that this rank's reading processes were replaced; the reader has told why."""
        self._worker_restarts += 1

    def write(self) -> None:
        """Print, append and export what happened since the last time. Collective, for every rank has its share."""
        gauges = self._gauged.gauges() if self._gauged is not None else {}
        means = {name: total / updates for name, (total, updates) in sorted(self._losses.items())}
        watched = [gauge.value for gauge in gauges.values()]
        counts = [*self._bad.values(), self._worker_restarts]
        counted = torch.tensor(counts, dtype=torch.float32, device=self._device)
        shared = mean_over_ranks(torch.cat([torch.stack([*means.values(), *watched]), counted])).tolist()
        losses = dict(zip(means, shared[: len(means)], strict=True))
        values = dict(zip(gauges, shared[len(means) : -len(counts)], strict=True))
        record = self.meter.record(losses, self.rates, values, memory_bytes())
        *replaced, restarts = (round(share * self._ranks.world) for share in shared[-len(counts) :])
        _log.info("%s", progress_line(record))
        if self.stats is not None and self.metrics is not None:
            self.stats.append(record)
            self.metrics.update(record)
            self._warn(gauges, values)
            for domain, number in zip(self._bad, replaced, strict=True):
                for _ in range(number):
                    self.metrics.bad_sample(domain)
            self.metrics.workers_restarted(restarts)
        self._losses, self._bad, self._worker_restarts = {}, dict.fromkeys(self._bad, 0), 0

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
