"""Says what an installation is made of, which implementation of each op runs here, and what memory a method needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import i2i_dist
from i2i_dist import ops
from i2i_dist.bench.facts import machine_facts
from i2i_dist.config import ConfigError, load
from i2i_dist.engines import Asked, refusal
from i2i_dist.memory import SideMemory, offloaded_memory, side_memory
from i2i_dist.methods import resolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 1 if an op has a kernel that cannot run here, 2 for wrong settings."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description="Say which implementation of each op runs on this machine, and why."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="also say what memory its networks' state needs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of it")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks that the state is spread over (default: 1)")
    options = parser.parse_args(arguments)
    try:
        lines, healthy = report()
        if options.config is not None:
            lines += ["", *memory_report(options.config, options.set, 1 if options.ranks is None else options.ranks)]
        elif options.set or options.ranks is not None:
            raise ConfigError("--set and --ranks belong to a configuration; name one with --config FILE")
    except ValueError as error:
        print(f"doctor.py: {error}", file=sys.stderr)
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


def memory_report(config: Path, settings: Sequence[str], ranks: int) -> list[str]:
    """Return the lines that say what memory the state of a configuration's networks needs on each rank.

    Nothing is allocated, so a method of any size can be asked for.

    Raises:
        ConfigError: The configuration is not usable, or there are fewer ranks than one.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks: given {ranks}, allowed is 1 or more")
    run = load(config, settings)
    method_class, method_config = resolve(run.method)
    with torch.device("meta"):
        method = method_class(method_config, torch.Generator())
    lines = [
        f"Memory on each of {ranks} ranks in GiB for parameters, gradients, Adam's state and averages, which are fp32",
        "in either precision. It is computed. On top come activations, which depend on size and batch, and are fewer",
        "with engine.checkpoint_activations; and while critics with spectral norm run, a copy of their weights. 'GPU'",
        "and 'CPU' are what lies where with engine.generator_offload or engine.discriminator_offload.",
    ]
    for side, groups in method.parameter_groups().items():
        module: nn.Module = getattr(method, side)
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in module.named_children()}
        networks = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        averaged = side == "generator" and run.train.ema_half_life_images > 0
        lines += ["", f"{side}: {networks}; {sum(counts.values()):,} parameters in all"]
        columns = (*(field for field in SideMemory._fields), "in all", "GPU", "CPU")
        lines.append(f"{'ZeRO':<6}" + "".join(f"{column:>12}" for column in columns))
        for stage in range(4):
            asked = Asked(side, stage, penalised=method.penalised and side == "discriminator")
            if problem := refusal(asked):
                lines.append(f"{stage:<6}is refused: {problem}")
                continue
            memory = side_memory(module, groups, stage, ranks, averaged)
            offloaded = offloaded_memory(module, groups, stage, ranks, averaged) if stage else ()
            cells = [*memory, memory.whole, *offloaded]
            lines.append(f"{stage:<6}" + "".join(f"{cell / 2**30:>12.2f}" for cell in cells))
    copied = 4 * sum(parameter.numel() for parameter in method.generator.parameters()) / 2**30
    return [*lines, "", f"Rank 0 also has a copy of the generator's side for sample grids: {copied:.2f} GiB."]
