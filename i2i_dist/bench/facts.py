"""What a measurement depends on besides the code: device, threads, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """Return the facts that stand beside every figure."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({_processor_field('model name')})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def build_facts(device: torch.device) -> dict[str, str | int]:
    """Return `machine_facts` and what else a kernel's time depends on: clocks, and versions of what compiled it."""
    facts = machine_facts(device)
    facts["compiler"] = _first_line(["c++", "--version"])
    if device.type == "cuda":
        facts["CUDA"] = str(torch.version.cuda)
        facts["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        clocks = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem"
        facts["clocks of SM, highest, of memory"] = _first_line(["nvidia-smi", clocks, "--format=csv,noheader"])
    else:
        facts["clock"] = _processor_field("cpu MHz") + " MHz"
    return facts


def device_kind(device: torch.device) -> str:
    """Return the device as a file name: "cpu", or the GPU's name, as in "h200"."""
    if device.type == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().replace("nvidia", "").split()
    return "-".join(words)


def json_path(target: Path, device: torch.device, ending: str) -> Path:
    """Return `target`, or the file for this kind of device in it if it is a folder."""
    return target / f"{device_kind(device)}{ending}" if target.is_dir() else target


def commit() -> str:
    """Return the commit of the checkout that this file lies in, or "unknown"; marked if files besides docs/ differ."""
    described = _git("describe", "--always", "--abbrev=12", "--exclude=*")
    if described is None:
        return "unknown"
    differing = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs")
    return described + ("-dirty" if differing else "")


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(done.stdout.splitlines()), "unknown")


def _processor_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, platform.machine())
