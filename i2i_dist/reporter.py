"""What a run says while it trains: the log, stats.jsonl, and Prometheus."""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from i2i_dist import __version__, ops
from i2i_dist.assembly import Run
from i2i_dist.collapse import Collapse
from i2i_dist.data.batch import Batch, HostBatch, LabelledBatch
from i2i_dist.distributed import gather_texts, mean_over_ranks
from i2i_dist.method import Gauged
from i2i_dist.pace import LOWEST_SCORE, Pace, scores
from i2i_dist.step import Step
from i2i_dist.telemetry.bad_updates import BadUpdates
from i2i_dist.telemetry.console import Meter, progress_line
from i2i_dist.telemetry.jsonl import StatsLog
from i2i_dist.telemetry.prometheus import Metrics, serve
from i2i_dist.telemetry.record import UpdateRecord, memory_bytes

_log = logging.getLogger("i2i_dist.reporter")


_SLOW_RANKS_NAMED = 4
_SLOW = "all others wait for it; look at its load, its disk and network, and at the clock and temperature of its device"


class Reporter:
    """Everything a run says while it trains. Rank 0 speaks for all; the others only name their own broken samples."""

    def __init__(self, run: Run) -> None:
        """Begin to report. Collective."""
        settings, start = run.settings, run.start
        self.meter = Meter(start.images_seen, run.target, start.updates)
        self.pace = Pace(run.device)
        self.rates: dict[str, float] = {}
        self.stats: StatsLog | None = None
        self.metrics: Metrics | None = None
        self._losses: dict[str, tuple[Tensor, int]] = {}  # name -> sum, and updates that computed it
        self._bad = dict.fromkeys(sorted(start.dataset), 0)  # domain -> samples replaced since the last record
        self._worker_restarts = 0  # since the last record
        self._named: set[tuple[str, str]] = set()
        self._bad_updates = BadUpdates(settings.directory)
        self._collapse = Collapse()
        self._gauged = run.method if isinstance(run.method, Gauged) else None
        self._low: set[str] = set()  # gauges that were below their lowest when they were last known
        self._slow: set[int] = set()  # ranks that were too slow at the last record
        self._hosts = gather_texts(socket.gethostname())
        self._ranks, self._device, self._server = run.ranks, run.device, None
        if run.ranks.rank:
            return
        self.stats = StatsLog(settings.directory / "stats.jsonl")
        build = {"version": __version__, "torch": torch.__version__, "python": platform.python_version()}
        build |= {f"op_{op}": kind for op, kind in ops.implementations(run.device.type).items()}
        names = {"method": start.config["method"]["name"], "precision": run.layout.precision}
        output = settings.config.output
        self.metrics = Metrics(build, names, start.images_seen, run.target, output.checkpoint_every_images)
        if output.metrics_port is not None:
            self._server = serve(self.metrics, output.metrics_host, output.metrics_port)

    def begin(self) -> None:
        """Mark the begin of an update, before its first batch is asked for."""
        self.meter.begin()
        self.pace.begin()

    def note(self, step: Step, number: int, images_seen: int, batch: Batch | LabelledBatch) -> None:
        """Take in an update, with `number` made before it and `images_seen` after it; `batch` is its last part."""
        for name, loss in step.losses.items():
            total, updates = self._losses.get(name, (torch.zeros_like(loss), 0))
            self._losses[name] = (total + loss, updates + 1)
        self.pace.end(step.ready)
        if not step.skipped:
            self._collapse.note(number, batch, step.heard)

    def note_skipped(self, step: Step, number: int, images_seen: int, keys: Mapping[str, Sequence[str]]) -> None:
        """Tell of an update that was dropped on some side, and of whose numbers were not finite. Collective.

        Args:
            step: What the update did.
            number: Updates made before it.
            images_seen: Images seen after it.
            keys: By domain, of this rank's samples in it.
        """
        for side in step.skipped if self.metrics is not None else ():
            _log.warning("A loss or gradient is not finite at image %d: the %s's step is dropped.", images_seen, side)
            self.metrics.skipped(side)  # type: ignore[union-attr]
        update = {"images_seen": images_seen, "update": number + 1, "skipped": step.skipped}
        losses = {name: float(loss) for name, loss in step.losses.items()}
        self._bad_updates.note(update, step.met, losses, keys)

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

    def write(self) -> UpdateRecord:
        """Print, append, export and return what happened since the last time. Collective: every rank has its share."""
        gauges = self._collapse.gauges() | dict(self._gauged.gauges() if self._gauged is not None else {})
        means = {name: total / updates for name, (total, updates) in sorted(self._losses.items())}
        watched = {name: gauge.value for name, gauge in gauges.items()}
        shared = self._shared(means, watched)
        losses, values = ({name: next(shared) for name in names} for names in (means, watched))
        replaced = {domain: round(next(shared) * self._ranks.world) for domain in self._bad}
        restarts = round(next(shared) * self._ranks.world)
        paces = scores([next(shared) * self._ranks.world for _ in range(self._ranks.world)])
        slowest = min(range(len(paces)), key=paces.__getitem__)
        record = self.meter.record(losses, self.rates, values, memory_bytes())
        record = record._replace(slowest_rank=slowest, slowest_rank_score=paces[slowest])
        low = {name for name, gauge in gauges.items() if values[name] < gauge.lowest}
        _log.info("%s", progress_line(record, low))
        if self.stats is not None and self.metrics is not None:
            self.stats.append(record)
            self.metrics.update(record)
            for name in sorted(low - self._low):
                lowest, advice = gauges[name].lowest, gauges[name].advice
                _log.warning("%s is %.2g, below %.2g: %s.", name, values[name], lowest, advice)
            self._warn_of_slow_ranks(paces)
            for domain, number in replaced.items():
                for _ in range(number):
                    self.metrics.bad_sample(domain)
            self.metrics.workers_restarted(restarts)
        self._low = self._low - gauges.keys() | low
        self._losses, self._bad, self._worker_restarts = {}, dict.fromkeys(self._bad, 0), 0
        return record

    def _shared(self, *numbers: Mapping[str, Tensor]) -> Iterator[float]:
        """Return the means over ranks of numbers by name, of what is counted, and each rank's part in that of paces.

        All in one collective: a number that is one rank's own is its part of a mean to which the others add nothing.
        """
        own = [0.0] * self._ranks.world
        own[self._ranks.rank] = self.pace.seconds()
        rest = torch.tensor(
            [*self._bad.values(), self._worker_restarts, *own], dtype=torch.float32, device=self._device
        )
        values = torch.stack([value for named in numbers for value in named.values()])
        return iter(mean_over_ranks(torch.cat([values, rest])).tolist())

    def _warn_of_slow_ranks(self, paces: Sequence[float]) -> None:
        """Tell of the slowest of the ranks that have become too slow since the last record."""
        slow = {rank for rank, score in enumerate(paces) if score < LOWEST_SCORE}
        for rank in sorted(slow - self._slow, key=paces.__getitem__)[:_SLOW_RANKS_NAMED]:
            score, host = paces[rank], self._hosts[rank]
            _log.warning("Rank %d (%s) works at %.2g of the other ranks' speed: %s.", rank, host, score, _SLOW)
        self._slow = slow

    def close(self) -> None:
        """Stop serving metrics."""
        if self._server is not None:
            self._server.close()
