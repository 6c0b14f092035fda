"""What a measurement depends on besides the code: device, threads, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """Return the facts that stand beside every figure."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({_processor()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of the checkout that this file lies in, marked if files differ from it, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
