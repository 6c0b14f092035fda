"""Times one training step of ours beside the same step written plainly, and compares their losses.

Each form lives in a process of its own, and they take turns step by step, so that both meet the same noise of the
machine and neither counts the other's memory. What a step launches is counted in one more step that is not timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from i2i_dist.bench.forms import SUBJECTS, Form, Reply, Request, Size, serve

TOLERANCE = 1e-4  # relative, of the first losses in fp32
# The adversarial terms meet critics after their first step. The bias of their logits then has a gradient whose real and
# fake parts cancel (the hinge is active everywhere), and Adam makes a step of up to its rate from what rounding leaves.
TOLERANCE_AFTER_A_STEP = 1e-3
# What `launches` counts, by the kind of device: the title of its column, and what that means.
COUNTED = {
    "cuda": ("launches", "kernels, copies and fills that the GPU was given"),
    "cpu": ("operators", "ATen operators that compute, as they are dispatched; each of ours is one"),
}
START_LIMIT = 300  # seconds: imports and DeepSpeed's start on a busy machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench.py step`."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"given {text}, allowed is 1 or more")
        return int(text)

    parser.add_argument("--method", choices=sorted(SUBJECTS), default="dclgan", help="whose step (default: dclgan)")
    parser.add_argument("--size", type=positive, default=256, help="height and width of the images (default: 256)")
    parser.add_argument("--batch", type=positive, default=1, help="images of each domain in a step (default: 1)")
    parser.add_argument("--width", type=positive, default=64, help="channels of the networks (default: 64)")
    parser.add_argument("--rounds", type=positive, default=5, help="measured steps of each form (default: 5)")
    parser.add_argument(
        "--step-limit", type=positive, default=600, help="seconds after which a step is given up (default: 600)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything, all samples included, here")


class _Contestant:
    """A form's process as the parent sees it: its samples, and the sentence that says why there are no more."""

    def __init__(self, form: Form, size: Size, device: str, step_limit: int) -> None:
        self.form, self.step_limit = form, step_limit
        self.seconds: list[float] = []
        self.launches: int | None = None
        self.peak_bytes = 0
        self.failure: str | None = None
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, form, size, device), daemon=True)
        self._process.start()
        theirs.close()
        self.facts = self._answer(START_LIMIT).facts

    def step(self, images: int) -> Reply:
        """Take one step, unless an earlier one failed."""
        return self._ask(Request(images))

    def measure(self, images: int) -> None:
        """Take one step and keep its time."""
        reply = self.step(images)
        if reply.failure is None:
            self.seconds.append(reply.seconds)

    def count(self, images: int) -> None:
        """Take one more step, and keep how much it starts."""
        reply = self._ask(Request(images, counted=True))
        if reply.failure is None:
            self.launches = reply.launches

    def end(self) -> None:
        """End the process."""
        if self.failure is None:
            self._pipe.send(None)
        self._process.join(timeout=30)
        self._process.kill()

    def _ask(self, request: Request) -> Reply:
        if self.failure is not None:
            return Reply(failure=self.failure)
        self._pipe.send(request)
        return self._answer(self.step_limit)

    def _answer(self, limit: int) -> Reply:
        reply = _receive(self._pipe, limit)
        if reply is None:
            self._process.join(timeout=30)
            code = self._process.exitcode
            why = f"signal {-code}, as when the machine's memory is used up" if code and code < 0 else f"status {code}"
            reply = Reply(failure=f"its process ended with {why}")
        self.failure = reply.failure
        if self.failure is not None:
            self._process.kill()
        self.peak_bytes = max(self.peak_bytes, reply.peak_bytes)
        return reply

    def result(self) -> dict[str, Any]:
        """Return what the JSON file says of this form."""
        times = self.seconds
        summary = {"median": statistics.median(times), "min": min(times), "max": max(times)} if times else {}
        return {
            **self.form._asdict(),
            "seconds": times,
            **summary,
            "peak_memory_bytes": self.peak_bytes,
            "launches": self.launches,
            "failure": self.failure,
        }


def _receive(pipe: Connection, limit: int) -> Reply | None:
    """Return the answer; one of our own after `limit` seconds; None if the process has ended."""
    try:
        if not pipe.poll(limit):
            return Reply(failure=f"no answer within {limit} seconds")
        reply: Reply = pipe.recv()
        return reply
    except (EOFError, ConnectionResetError):
        return None


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and return the exit status: 1 if the forms' losses differ or ours failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size(options.size, options.batch, options.width)
    forms = [Form("ours", method=options.method), Form("eager", method=options.method)]
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        forms.append(Form("ours", "bf16", options.method))
    contestants = [_Contestant(form, size, device, options.step_limit) for form in forms]
    try:
        # The first step also warms up.
        agreement = _compare(*[contestant.step(size.batch).losses for contestant in contestants][:2])
        for number in range(options.rounds):
            for contestant in contestants:
                contestant.measure(size.batch)
            latest = ", ".join(
                f"{c.form.name} {c.form.precision} {c.seconds[-1]:.3f} s" for c in contestants if c.seconds
            )
            print(f"round {number + 1} of {options.rounds}: {latest}", file=sys.stderr, flush=True)
        for contestant in contestants:
            contestant.count(size.batch)
    finally:
        for contestant in contestants:
            contestant.end()
    result = {
        "setting": {"method": options.method, **size._asdict(), "rounds": options.rounds},
        "counted": COUNTED[device],
        "machine": next((c.facts for c in contestants if c.facts), {}),
        "forms": [contestant.result() for contestant in contestants],
        "agreement": agreement,
        **_ratios(*contestants[:2]),
    }
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    agrees = agreement is None or agreement["agree"]
    return 0 if agrees and contestants[0].failure is None else 1


def _compare(ours: dict[str, float], eager: dict[str, float]) -> dict[str, Any] | None:
    """Return the term whose first values are farthest from agreeing; None if either form had none to show."""
    if not ours or not eager:
        return None
    differences = {name: abs(ours[name] - value) / max(abs(value), 1e-12) for name, value in eager.items()}
    allowed = {name: TOLERANCE_AFTER_A_STEP if name.startswith("gan_") else TOLERANCE for name in eager}
    worst = max(differences, key=lambda name: differences[name] / allowed[name])
    verdict = {"term": worst, "relative_difference": differences[worst], "allowed": allowed[worst]}
    return {**verdict, "agree": differences[worst] <= allowed[worst], "ours": ours, "eager": eager}


def _ratios(ours: _Contestant, eager: _Contestant) -> dict[str, float]:
    if not ours.seconds or not eager.seconds:
        return {}
    return {
        "time_ratio": statistics.median(eager.seconds) / statistics.median(ours.seconds),
        "fastest_ratio": min(eager.seconds) / min(ours.seconds),  # what other programs on the machine distort least
        "memory_ratio": eager.peak_bytes / max(ours.peak_bytes, 1),
        **({"launch_ratio": eager.launches / ours.launches} if eager.launches and ours.launches else {}),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    setting, machine, (counted, meaning) = result["setting"], result["machine"], result["counted"]
    title, pooled = SUBJECTS[setting["method"]].title, setting["method"] == "dclgan" and setting["batch"] > 1
    lines = [
        f"One {title} training step, preset official, "
        + "{size} x {size}, batch {batch}, width {width}".format(**setting),
        *(["Negatives: the patches of the whole batch, in all forms"] if pooled else []),
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        f"{counted}: {meaning}",
        "",
        f"{'form':<7}{'precision':<11}{'seconds, median (min .. max)':<34}{'peak memory':<14}{counted}",
    ]
    for form in result["forms"]:
        line = f"{form['name']:<7}{form['precision']:<11}"
        if form["seconds"]:
            spread = f"{form['median']:.3f} ({form['min']:.3f} .. {form['max']:.3f})"
            memory = f"{form['peak_memory_bytes'] / 2**30:.2f} GiB"
            line += f"{spread:<34}{memory:<14}{'' if form['launches'] is None else form['launches']}"
        lines.append(line + (f"   stopped: {form['failure']}" if form["failure"] else ""))
    lines.append("")
    if "time_ratio" in result:
        words = "{time_ratio:.2f} of the time (fastest steps: {fastest_ratio:.2f}), {memory_ratio:.2f} of the memory"
        launches = f", {result['launch_ratio']:.2f} of the {counted}" if "launch_ratio" in result else ""
        lines.append("eager / ours in fp32: " + words.format(**result) + launches)
    return "\n".join([*lines, _verdict(result["agreement"], setting["batch"])])


def _verdict(agreement: dict[str, Any] | None, batch: int) -> str:
    if agreement is None:
        return "The first losses were not compared: one of the forms had none."
    words = "agree" if agreement["agree"] else "DIFFER: these are not the same step"
    return (
        f"First losses at batch {batch} {words}; {agreement['term']} is the farthest apart, with a relative "
        f"difference of {agreement['relative_difference']:.1e} of at most {agreement['allowed']:.0e}."
    )
