"""What people read while a run goes on: the plan at its start, a line per log point, and where log lines go."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from i2i_dist.telemetry.record import UpdateRecord

_HANDLER_PREFIX = "i2i_dist."


@dataclass(frozen=True)
class Plan:
    """What a run is about to do.

    Attributes:
        method: Name of the method.
        run_directory: Where everything of the run is written.
        device: Kind of device, "cuda" or "cpu".
        nodes: Machines.
        ranks: Processes on all machines together.
        micro_batch: Images per rank and forward pass.
        accumulation: Micro-batches per update and rank.
        parameters: Number of parameters of each network.
        images_seen: Images at which the run starts; above 0 when it resumes.
        target_images: Images at which it ends.
        updates: Updates of the whole run.
        precision: "fp32" or "bf16".
        zero_stages: ZeRO stage of each side.
        offloaded: Sides whose optimizer lies in CPU memory.
        recomputed: Whether blocks of the generator run again in the backward pass.
        ops_backend: What computes the fused ops, as `ops` names it.
        checkpoint_bytes: How large a checkpoint will be.
        checkpoints_at_most: How many will lie on the disk at once.
        checkpoint_room: Bytes that are free for them; None where that is unknown.
    """

    method: str
    run_directory: Path
    device: str
    nodes: int
    ranks: int
    micro_batch: int
    accumulation: int
    parameters: Mapping[str, int]
    images_seen: int
    target_images: int
    updates: int
    precision: str
    zero_stages: Mapping[str, int]
    offloaded: Collection[str]
    recomputed: bool
    ops_backend: str
    checkpoint_bytes: int
    checkpoints_at_most: int
    checkpoint_room: int | None

    @property
    def global_batch(self) -> int:
        """Images per update over all ranks."""
        return self.micro_batch * self.accumulation * self.ranks


def plan_text(plan: Plan) -> str:
    """Return the plan as the lines that a run prints at its start."""
    networks = ", ".join(f"{name} {_count(number)}" for name, number in plan.parameters.items())
    stages = ", ".join(
        f"{side} {stage}{' offloaded' if side in plan.offloaded else ''}" for side, stage in plan.zero_stages.items()
    )
    stages += "; blocks recomputed" if plan.recomputed else ""
    length = f"{_count(plan.target_images)} images, {plan.updates:,} updates"
    if plan.images_seen:
        length += f"; resumes at image {_count(plan.images_seen)}"
    room = "an unknown amount" if plan.checkpoint_room is None else bytes_text(plan.checkpoint_room)
    rows = {
        "method": f"{plan.method}, {plan.precision}, ops {plan.ops_backend}",
        "ranks": f"{_plural(plan.nodes, 'node')}, {_plural(plan.ranks, 'rank')} on {plan.device}; ZeRO stage {stages}",
        "batch": f"{plan.micro_batch} micro x {plan.accumulation} accumulation x {plan.ranks} world"
        f" = {plan.global_batch} global",
        "parameters": f"{networks}; {_count(sum(plan.parameters.values()))} in all",
        "length": length,
        "checkpoints": f"at most {plan.checkpoints_at_most} of {bytes_text(plan.checkpoint_bytes)}: "
        f"{bytes_text(plan.checkpoints_at_most * plan.checkpoint_bytes)} of {room} free",
        "run": str(plan.run_directory),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())


def progress_line(record: UpdateRecord, low: Collection[str] = ()) -> str:
    """Return the line of one log point: position, losses by name, rates, speed, memory, time to go.

    Of the gauges it shows those named in `low`, which are lower than they should be.
    """
    shown = record.losses | {name: record.gauges[name] for name in sorted(low)}
    losses = " ".join(f"{name} {_number(value)}" for name, value in shown.items())
    position = f"img {_count(record.images_seen)}/{_count(record.target_images)}  update {record.update}"
    return " | ".join(
        [
            f"{position}  {losses}".rstrip(),
            f"lr {_learning_rates(record.learning_rates)}",
            f"{_number(record.images_per_second)} img/s (data {record.data_wait_share:.0%})",
            f"mem {record.memory_bytes / 1e9:.1f} GB",
            f"eta {_duration(record.eta_seconds)}",
        ]
    )


def _count(number: int) -> str:
    """128000 -> "128.0k"; the bounds lie where rounding would give "1000.0k"."""
    for bound, unit, letter in ((999.95e6, 1e9, "G"), (999.95e3, 1e6, "M"), (1e3, 1e3, "k")):
        if number >= bound:
            return f"{number / unit:.1f}{letter}"
    return str(number)


def bytes_text(number: int) -> str:
    """1234567890 -> "1.2 GB"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"


def _number(value: float) -> str:
    """Three digits, without an exponent below a million: a loss that runs away is still read at a glance."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _learning_rates(rates: Mapping[str, float]) -> str:
    """One figure where all groups agree, else one for each group."""
    texts = {group: _rate(rate) for group, rate in rates.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return " ".join(f"{group} {text}" for group, text in texts.items())


def _rate(rate: float) -> str:
    """0.0002 -> "2.0e-4"."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return "0" if rate == 0 else f"{mantissa}e{int(exponent)}"


def _duration(seconds: float) -> str:
    """27670 -> "7:41:10", with days in front where there are any."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


class Meter:
    """Collects what happens between two log points and sums it up in a record.

    Time counts from `begin` to `end` of each update, so checkpoints, samples and evaluation between updates do not
    dilute the speed. The expected time to the end does include them: it comes from the wall clock since the first
    update's end, the first one being slow (compilation, autotuning, cold caches).
    """

    def __init__(
        self, images_seen: int, target_images: int, update: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start at a point of the run.

        Args:
            images_seen: Images seen so far; above 0 when the run resumes.
            target_images: Images at which the run ends.
            update: Updates made so far.
            clock: Monotonic time in seconds.
        """
        self._images_seen = images_seen
        self._target_images = target_images
        self._update = update
        self._clock = clock
        self._begun = clock()
        self._warm: tuple[float, int] | None = None  # clock and images seen at the end of the first update
        self._clear()

    def _clear(self) -> None:
        self._window_start = self._images_seen
        self._update_seconds: list[float] = []
        self._data_wait_seconds = 0.0

    def begin(self) -> None:
        """Mark the begin of an update, before its first batch is asked for."""
        self._begun = self._clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the `with` block, anywhere between `begin` and `end`, as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._data_wait_seconds += self._clock() - start

    def end(self, images_seen: int) -> None:
        """Mark the end of an update, with `images_seen` images seen by now over all ranks."""
        now = self._clock()
        self._update_seconds.append(now - self._begun)
        self._images_seen = images_seen
        self._update += 1
        if self._warm is None:
            self._warm = (now, images_seen)

    def record(
        self,
        losses: Mapping[str, float],
        learning_rates: Mapping[str, float],
        gauges: Mapping[str, float],
        memory_bytes: int,
    ) -> UpdateRecord:
        """Return the record of the updates since the last one, and start the next.

        Args:
            losses: By name, their means over these updates; NaN and infinity are allowed.
            learning_rates: By parameter group, those of the last update.
            gauges: By name, what is watched beside the losses.
            memory_bytes: What the process takes.

        Raises:
            ValueError: No update has ended since the last record.
        """
        if not self._update_seconds:
            raise ValueError("a record needs at least one update since the last record")
        seconds = sum(self._update_seconds)
        images_per_second = _ratio(self._images_seen - self._window_start, seconds)
        record = UpdateRecord(
            images_seen=self._images_seen,
            target_images=self._target_images,
            update=self._update,
            losses=dict(losses),
            learning_rates=dict(learning_rates),
            gauges=dict(gauges),
            images_per_second=images_per_second,
            seconds_per_update=seconds / len(self._update_seconds),
            data_wait_share=min(1.0, _ratio(self._data_wait_seconds, seconds)),
            data_wait_seconds=self._data_wait_seconds,
            update_seconds=tuple(self._update_seconds),
            memory_bytes=memory_bytes,
            eta_seconds=self._eta(images_per_second),
        )
        self._clear()
        return record

    def _eta(self, images_per_second: float) -> float:
        remaining = max(0, self._target_images - self._images_seen)
        if self._warm is not None and self._images_seen > self._warm[1]:
            images_per_second = _ratio(self._images_seen - self._warm[1], self._clock() - self._warm[0])
        if remaining == 0:
            return 0.0
        return remaining / images_per_second if images_per_second > 0 else math.inf


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


class _ConsoleFormatter(logging.Formatter):
    """Plain lines for rank 0's news; a level, and elsewhere the rank, in front of what needs attention."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return text if self._rank == 0 else f"rank {self._rank}: {text}"


def log_path(rank: int, run_directory: Path) -> Path:
    """Return where a rank keeps its log."""
    return run_directory / "logs" / f"rank_{rank:04}.log"


def setup_logging(rank: int, run_directory: Path) -> None:
    """Send log lines to the console and to the rank's own file, `logs/rank_XXXX.log` in the run directory.

    Rank 0 writes plain lines to standard output; the other ranks write warnings and errors to standard error, with
    their number in front. The file gets everything with time, level and origin. A second call replaces the first.

    Raises:
        OSError: The file cannot be created.
    """
    path = log_path(rank, run_directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    console = logging.StreamHandler(sys.stdout if rank == 0 else sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_ConsoleFormatter(rank))
    console.set_name(_HANDLER_PREFIX + "console")
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.set_name(_HANDLER_PREFIX + "file")

    root = logging.getLogger()
    for handler in list(root.handlers):
        if (handler.get_name() or "").startswith(_HANDLER_PREFIX):
            root.removeHandler(handler)
            handler.close()
    root.addHandler(console)
    root.addHandler(file)
    # The root keeps its level, so that other packages are heard from WARNING on only.
    logging.getLogger("i2i_dist").setLevel(logging.INFO)
