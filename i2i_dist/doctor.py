"""Says what an installation is made of, and which implementation of each op runs here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

import torch

import i2i_dist
from i2i_dist import ops
from i2i_dist.bench.facts import machine_facts


def main() -> int:
    """Print the report; the exit status is 1 if an op has a kernel that cannot run here, 2 for a wrong I2I_DIST_OPS."""
    argparse.ArgumentParser(
        description="Say which implementation of each op runs on this machine, and why."
    ).parse_args()
    try:
        lines, healthy = report()
    except ValueError as error:
        print(f"error: {error}")
        return 2
    print("\n".join(lines))
    return 0 if healthy else 1


def report() -> tuple[list[str], bool]:
    """Return the lines of the report, and whether every op runs as it was asked to.

    Raises:
        ValueError: If I2I_DIST_OPS has a value that is not known.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows, healthy = [], True
    for op in ops.KERNELS:
        for device in devices:
            choice = ops.choose(op, device)
            healthy = healthy and (choice.native or choice.reason == "I2I_DIST_OPS=reference")
            otherwise = "nothing" if os.environ.get("I2I_DIST_OPS") == "native" else "reference"
            rows.append(f"{op:<20}{device:<8}{'kernel' if choice.native else otherwise:<12}{choice.reason}")
    return [*_versions(devices), "", f"{'op':<20}{'device':<8}{'runs':<12}because", *rows], healthy


def _versions(devices: list[str]) -> list[str]:
    info = ops.build_info()
    extension = info["problem"] or (
        f"built against torch {info['torch']}, "
        + (f"CUDA {info['cuda_version']} for {' '.join(info['cuda_archs'])}" if info["cuda_archs"] else "without CUDA")
    )
    found = [str(machine_facts(torch.device(device))["device"]) for device in devices]
    if "cuda" not in devices:
        found.append("no CUDA device")
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "webdataset"))
    return [
        f"i2i_dist    {i2i_dist.__version__}, Python {platform.python_version()}, {packages}",
        f"devices     {', '.join(found)}; {torch.get_num_threads()} threads",
        f"extension   {extension}",
    ]
