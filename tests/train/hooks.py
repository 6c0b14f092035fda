"""Faults: functions that a test has called in a run's process before the run begins."""

from __future__ import annotations

import errno
import hashlib
import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prometheus_client import generate_latest
from torch import nn

from i2i_dist import engines, lifeline, loop, plan, publishing, reporter, run_directory, stopping, supervise
from i2i_dist.data import reader
from i2i_dist.data.batch import BadData
from i2i_dist.ema import Ema
from i2i_dist.saver import Saver

FILE_LIMIT = 40_000  # bytes: less than one side of a checkpoint, more than everything else that a short run writes


def files_stay_small() -> None:
    """What a full disk does, to large files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))


def little_room() -> None:
    """A disk on which a thousand bytes are free."""
    plan.free_bytes = lambda directory: 1000


def saves_take_three_updates() -> None:
    """A phase ends before the next update, however busy the disk is; so it is certain at which the next save begins."""
    real = Saver.flags.fget
    assert real is not None

    def flags(self: Saver) -> tuple[bool, bool]:
        if self._thread is not None:
            self._thread.join()
        return real(self)

    Saver.flags = property(flags)  # type: ignore[method-assign, assignment]


def _in_second_checkpoint(change: Callable[[Callable[[], None]], None], name: str = "write_share") -> None:
    """Have `change` called with what this rank does in a phase of the second checkpoint, in place of it."""
    real, calls = getattr(publishing, name), itertools.count()

    def call(*arguments: Any) -> None:
        if next(calls) == 1:
            change(lambda: real(*arguments))
        else:
            real(*arguments)

    setattr(publishing, name, call)


def disk_hangs_in_second_checkpoint() -> None:
    """For longer than any run waits."""
    _in_second_checkpoint(lambda write: time.sleep(3600))


def disk_hangs_where_second_checkpoint_is_created() -> None:
    """The same before there is a file; of rank 0, since no other one creates any."""
    _in_second_checkpoint(lambda create: time.sleep(3600), "create")


def disk_full_in_second_checkpoint() -> None:
    """At the tenth piece that is written, others having been."""
    real = os.pwrite

    def fail(write: Callable[[], None]) -> None:
        calls = itertools.count()

        def pwrite(*arguments: Any) -> int:
            if next(calls) == 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        os.pwrite = pwrite
        try:
            write()
        finally:
            os.pwrite = real

    _in_second_checkpoint(fail)


def dies_with_its_share_of_second_checkpoint() -> None:
    def die(write: Callable[[], None]) -> None:
        write()
        os.kill(os.getpid(), signal.SIGKILL)

    _in_second_checkpoint(die)


def second_checkpoint_waits_for_a_signal() -> None:
    """So that it falls into the writing of it, and a second one as well."""
    real, heard = stopping.StopRequest._note, itertools.count()
    twice = threading.Event()

    def note(self: Any, number: int, frame: Any) -> None:
        real(self, number, frame)
        if next(heard) == 1:
            twice.set()

    def hold(write: Callable[[], None]) -> None:
        print("writing the second checkpoint", flush=True)
        twice.wait()
        write()

    stopping.StopRequest._note = note
    _in_second_checkpoint(hold)


def a_launcher_is_lost_at_update_5() -> None:
    """That of rank 1; whoever reports a loss to a supervisor says so."""
    real, made = stopping.StopRequest.__init__, list[Any]()

    def init(self: Any, launchers: tuple[int, ...]) -> None:
        real(self, launchers)
        made.append(self)

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 5 and os.environ["RANK"] == "1":
            made[0].asked = made[0].launcher_lost = True

    stopping.StopRequest.__init__ = init  # type: ignore[method-assign]
    supervise.report_loss = lambda: print("told the supervisor of the loss", flush=True)
    _before_updates(change)


def small_parameters_are_cut() -> None:
    """ZeRO 3 leaves them whole otherwise, and a network of these tests has no others."""
    real = engines.SideEngine.__init__

    def init(self: Any, module: Any, groups: Any, layout: Any, *arguments: Any, **named: Any) -> None:
        real(self, module, groups, layout._replace(persistence_threshold=0), *arguments, **named)
        if layout.stage == 3:
            assert any(parameter.numel() == 0 for parameter in module.parameters()), "nothing is cut"

    engines.SideEngine.__init__ = init  # type: ignore[method-assign]


def nothing_can_be_read() -> None:
    def broken(data: bytes) -> Any:
        raise BadData("broken on purpose")

    reader.decode_image = broken


def _before_updates(change: Callable[[int, Any, Any], None]) -> None:
    real = loop.update

    def update(method: Any, sides: Any, batches: Any, *arguments: Any, number: int, **named: Any) -> Any:
        change(number, sides, batches)
        return real(method, sides, batches, *arguments, number=number, **named)

    loop.update = update


def _spoil(batches: Any) -> None:
    batches[0].a.fill_(float("nan"))


def nan_from_update_5() -> None:
    _before_updates(lambda number, sides, batches: _spoil(batches) if number >= 5 else None)


def _keep_the_metrics() -> None:
    """Leave in the run's directory what a last scrape would find."""
    real = reporter.Reporter.close

    def close(self: Any) -> None:
        if self.metrics is not None:
            (self.stats.path.parent / "metrics.txt").write_bytes(generate_latest(self.metrics.registry))
        real(self)

    reporter.Reporter.close = close  # type: ignore[method-assign]


def _note_states() -> None:
    """Tell, before each update, of all that a dropped one must leave alone; and when the weights are averaged."""
    real, real_average = loop.update, Ema.update

    def update(method: Any, sides: Any, batches: Any, pools: Any, *, number: int, **named: Any) -> Any:
        held = {"pools": [image for images in pools.images.values() for image in images]}
        for name, side in sides.items():
            moments = [state[key] for state in side.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
            held[name] = [*side.module.parameters(), *moments]
        for name, tensors in held.items():
            digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()
            print(f"before update {number}: {name} {digest}", flush=True)
        return real(method, sides, batches, pools, number=number, **named)

    def average(self: Any, images_seen: int, images: int) -> None:
        print(f"averaged at image {images_seen}", flush=True)
        real_average(self, images_seen, images)

    loop.update, Ema.update = update, average  # type: ignore[method-assign]


def nan_in_update_3_and_in_a_gradient_of_update_4() -> None:
    """The losses of update 4 are finite."""

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 3:
            _spoil(batches)
        if number == 4:
            layer = next(one for one in sides["generator"].module.modules() if isinstance(one, nn.Conv2d))

            def spoil(layer: Any, inputs: Any, output: torch.Tensor) -> None:
                handle.remove()
                output.register_hook(lambda gradient: gradient * float("nan"))

            handle = layer.register_forward_hook(spoil)

    _keep_the_metrics()
    _before_updates(change)
    _note_states()


EQUAL, SLOW = 17, 28  # updates: before EQUAL ranks work equally long; then one is slow, and at SLOW a weight is another


def steady_while_the_clock_is_set_back() -> None:
    """Every update takes a while of its own; in the third an hour is taken from the clock."""
    real = time.time

    def change(number: int, sides: Any, batches: Any) -> None:
        time.sleep(0.2)
        if number == 3:
            time.time = lambda: real() - 3600.0

    _keep_the_metrics()
    _before_updates(change)


def slow_and_then_with_another_weight() -> None:
    def change(number: int, sides: Any, batches: Any) -> None:
        time.sleep(0.2 if number < EQUAL else 0.8)
        if number == SLOW:
            name, weight = list(sides["generator"].module.named_parameters())[5]
            weight.data.view(-1).view(torch.int32)[0] ^= 1 << 12
            print(f"another weight: {name}.", flush=True)

    _before_updates(change)


def error_at_update_3() -> None:
    """An error of a kind that nothing foresees."""

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 3:
            raise KeyError("unforeseen")

    _before_updates(change)


def dies_at_update_5() -> None:
    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 5:
            time.sleep(1.0)  # the others are to have all that update 4 exchanges
            os.kill(os.getpid(), signal.SIGKILL)

    _before_updates(change)


def hears_nothing_from_update_5() -> None:
    """What NCCL does when a rank on the same machine is gone: a collective that never ends."""
    _before_updates(lambda number, sides, batches: time.sleep(3600) if number == 5 else None)


def hears_nothing_on_another_machine() -> None:
    lifeline._process_table = lambda: "another machine"
    hears_nothing_from_update_5()


def infinite_weight_at_update_5() -> None:
    """A weight that no forward pass notices: a bias in front of an instance norm."""

    def change(number: int, sides: Any, batches: Any) -> None:
        if number == 5:
            moments = sides["generator"].optimizer.state
            next(iter(moments.values()))["exp_avg_sq"].fill_(float("inf"))

    _before_updates(change)


def another_run_directory() -> None:
    """What a rank meets on a machine with a disk of its own."""
    real = run_directory.check_shared
    run_directory.check_shared = lambda directory: real(directory / "elsewhere")


def faults_of_a_job() -> None:
    """Rank 1 is killed in the middle of update 7, once; rank 0 waits in update 16, once, until it is told to stop.

    FAKE_SLURM_LOG is told of every signal that a rank hears.
    """
    log, rank = Path(os.environ["FAKE_SLURM_LOG"]), os.environ["SLURM_PROCID"]
    killed, waits = log.with_name("killed"), log.with_name("waits")
    real = stopping.StopRequest._note

    def note(self: Any, number: int, frame: Any) -> None:
        with log.open("a") as file:
            file.write(f"rank {rank} heard {signal.Signals(number).name}\n")
        real(self, number, frame)

    def change(number: int, sides: Any, batches: Any) -> None:
        if (rank, number) == ("1", 7) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (rank, number) == ("0", 16) and not waits.exists():
            waits.touch()
            while "rank 0 heard" not in log.read_text():
                time.sleep(0.01)

    stopping.StopRequest._note = note
    _before_updates(change)


def samples_are_noted() -> None:
    """Append a line for each sample that an update is given, its position and a digest of its pictures, to $SAMPLES."""
    real = loop.to_device

    def noted(host: Any, device: Any) -> Any:
        with open(os.environ["SAMPLES"], "a", encoding="utf-8") as file:
            file.writelines(sample_lines(host))
        return real(host, device)

    loop.to_device = noted


def sample_lines(host: Any) -> list[str]:
    digests = [
        hashlib.sha256(b"".join(host.images[domain][row].numpy().tobytes() for domain in "ab")).hexdigest()
        for row in range(len(host.positions))
    ]
    return [f"{position} {digest}\n" for position, digest in zip(host.positions.tolist(), digests, strict=True)]


def reading_processes_are_lost() -> None:
    """One is killed before update 10, and one stopped before update 14; $PAGE holds the metrics before update 23."""
    samples_are_noted()

    def change(number: int, sides: Any, batches: Any) -> None:
        if fault := {10: signal.SIGKILL, 14: signal.SIGSTOP}.get(number):
            os.kill(multiprocessing.active_children()[0].pid or 0, fault)
        if number == 23:
            with urllib.request.urlopen(f"http://127.0.0.1:{os.environ['PORT']}/metrics", timeout=60) as page:
                Path(os.environ["PAGE"]).write_bytes(page.read())

    _before_updates(change)
