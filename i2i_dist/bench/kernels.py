"""Times the native ops beside the published formulations, torch.compile and the floor: `bench.py kernels`."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from i2i_dist import ops
from i2i_dist.bench.facts import build_facts, json_path
from i2i_dist.bench.kernel_cases import Case, Exact, Form, Problem, build, default_cases
from i2i_dist.bench.memory import limit_memory, peak_bytes
from i2i_dist.bench.tables import kernel_table
from i2i_dist.bench.timing import (
    Clock,
    Sample,
    capture,
    compiled,
    copy_rate,
    count_launches,
    math_mode,
    product_rate,
    run_once,
    spread,
    take_turns,
)

LIMITS = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}
"""The largest difference from the fp64 reference, relative to its largest value, of a form that computes the same."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench.py kernels`."""
    parser.add_argument("--cases", default="", metavar="PATTERN", help="only cases with this in their name; * matches")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the turns of a case (default: 4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="also write everything to this file, or to the device's own in this folder",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print tables and return the exit status: 1 if a form computes something else or ours failed."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = [case for case in default_cases(device.type) if fnmatch.fnmatch(case.name, f"*{options.cases}*")]
    if options.list or not cases:
        print("\n".join(case.name for case in cases) or f"No case has {options.cases!r} in its name; see --list.")
        return 0 if cases else 2
    refusal = why_not_native({case.native_op for case in cases}, device.type)
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return 2
    if device.type == "cpu":
        limit_memory()
    torch._inductor.config.autotune_num_choices_displayed = 0
    rates = _rates(cases, device)
    path = None if options.json is None else json_path(options.json, device, ".json")
    machine = {"kind": device.type, "machine": build_facts(device), "rates": rates}
    results: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        print(f"{number + 1} of {len(cases)}: {case.name}", file=sys.stderr, flush=True)
        results.append(measure(case, device, rates, options.seconds))
        print(kernel_table([results[-1]], device.type), flush=True)
        if path is not None:
            _record(path, machine, results[-1])
    print(", ".join(f"{key} {value}" for key, value in build_facts(device).items()))
    return 0 if all(_passed(case) for case in results) else 1


def _record(path: Path, machine: dict[str, Any], case: dict[str, Any]) -> None:
    """Add a case to the file; what it holds of the same commit on the same machine is kept, so runs add up to one."""
    command = "python launchers/bench.py " + shlex.join(sys.argv[1:])
    known = json.loads(path.read_text()) if path.exists() else {}
    if any(known.get("machine", {}).get(key) != machine["machine"][key] for key in ("device", "torch", "commit")):
        known = {}
    commands = [*(found for found in known.get("commands", []) if found != command), command]
    found = {old["name"]: old for old in known.get("cases", [])} | {case["name"]: case}
    rates = known.get("rates", {}) | machine["rates"]
    order = {default.name: number for number, default in enumerate(default_cases(machine["kind"]))}
    cases = sorted(found.values(), key=lambda one: order.get(one["name"], len(order)))
    path.write_text(json.dumps({"commands": commands, **machine, "rates": rates, "cases": cases}, indent=1) + "\n")


def why_not_native(wanted: set[str], device_type: str) -> str | None:
    """Demand the kernels of `wanted` for this process and its children; return the sentence if they are not there."""
    mode = os.environ.get("I2I_DIST_OPS", "auto")
    if mode == "reference":
        return "I2I_DIST_OPS=reference is set, but this command measures the native kernels; unset it."
    os.environ["I2I_DIST_OPS"] = "native"
    for op in sorted(wanted):
        choice = ops.choose(op, device_type)
        if not choice.native:
            return f"This command measures the native kernels, but that of {op} cannot run: {choice.reason}."
    return None


def _rates(cases: Sequence[Case], device: torch.device) -> dict[str, float]:
    """Return bytes per second of a copy and operations per second of products, as met on this machine now."""
    precisions = sorted({case.precision for case in cases if case.op == "patch_nce"})
    return {"copy": copy_rate(device)} | {precision: product_rate(device, precision) for precision in precisions}


class _Contestant:
    """A form of a case: checked, then timed in turn with the others until something stops it."""

    def __init__(self, form: Form, problem: Problem, exact: Exact, clock: Clock, limit: float) -> None:
        self.form = compiled(form)
        self.samples: list[Sample] = []
        self.error: float | None = None
        self.failure: str | None = None
        self.disagrees = False
        self._grad, self._clock = problem.grad, clock
        self._guard(lambda: self._check(exact, limit))

    def turn(self) -> None:
        """Take one sample."""
        self._guard(lambda: self.samples.append(self._clock.time(self.form, self._grad)))

    def result(self, case: Case, floor: float) -> dict[str, Any]:
        """Count launches and memory, and return what the JSON file says of this form; times in milliseconds."""
        counts: dict[str, Any] = {"launches": None, "peak_bytes": None}
        self._guard(lambda: counts.update(launches=count_launches(self.form, self._grad)))
        self._guard(lambda: counts.update(peak_bytes=peak_bytes(case, self.form, self._grad)))
        row: dict[str, Any] = {"form": self.form.name, "gradient_only": self.form.gradient is not None}
        row |= {"failure": self.failure, "disagrees": self.disagrees, "error": self.error, **counts}
        if self.samples:
            both = spread([sum(sample) for sample in self.samples])
            row |= {"runs": len(self.samples), "both": both, "share_of_floor": floor / both["median"]}
            row |= {name: spread([getattr(sample, name) for sample in self.samples]) for name in Sample._fields}
        if self.form.leaves[0].device.type == "cuda" and self.failure is None:
            row |= self._in_a_graph()
        return row

    def _in_a_graph(self) -> dict[str, Any]:
        """Time the replay of a CUDA graph; not in turn with others, because a graph keeps its memory while it lives."""
        try:
            replay = capture(self.form, self._grad)
            return {"graph": spread([self._clock.time_call(replay) for _ in self.samples])}
        except Exception as error:
            return {"graph_failure": _sentence(error)}
        finally:
            torch.cuda.empty_cache()

    def _check(self, exact: Exact, limit: float) -> None:
        self.error = error(self.form, self._grad, exact)
        if not self.error <= limit:
            self.disagrees = True
            self.failure = f"it computes something else: an error of {self.error:.1e} of at most {limit:.0e}"

    def _guard(self, call: Callable[[], object]) -> None:
        """Call, unless something failed before."""
        if self.failure is not None:
            return
        try:
            call()
        except Exception as error:
            self.failure = _sentence(error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def error(form: Form, grad: Tensor | None, exact: Exact) -> float:
    """Return the largest difference from the reference in output and gradients, relative to its largest value."""
    output, gradients = run_once(form, grad)
    output = output.detach()
    if form.gradient is not None:
        pairs = list(zip(form.gradient(output), exact.gradients, strict=True))
    else:
        pairs = [(output, exact.output), *zip(gradients, exact.gradients, strict=True)]
    return max(float((found.double() - right).abs().max() / right.abs().max()) for found, right in pairs)


def measure(case: Case, device: torch.device, rates: dict[str, float], seconds: float) -> dict[str, Any]:
    """Measure all forms of one case."""
    torch.compiler.reset()
    with math_mode(case.precision):
        problem = build(case, device)
        exact, clock = problem.exact(), Clock(device)
        limit = LIMITS[case.precision]
        contestants = [_Contestant(form, problem, exact, clock, limit) for form in problem.forms]
        del exact
        take_turns([contestant.turn for contestant in contestants], seconds)
        floor = 1e3 * problem.floor_bytes / rates["copy"]
        if problem.floor_operations:
            floor = max(floor, 1e3 * problem.floor_operations / rates[case.precision])
        rows = [contestant.result(case, floor) for contestant in contestants]
    facts = {"op": case.op, "name": case.name, "size": case.size, "precision": case.precision}
    return {**facts, "floor": floor, "rows": rows}


def _passed(case: dict[str, Any]) -> bool:
    ours = next(row for row in case["rows"] if row["form"] == "ours")
    return ours["failure"] is None and not any(row["disagrees"] for row in case["rows"])
