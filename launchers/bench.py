"""Measures: `python launchers/bench.py step --size 64 --batch 1`, and `kernels`, `share`, `report`."""

from __future__ import annotations

import argparse
import sys

from i2i_dist.bench import kernels, report, share, step

COMMANDS = {
    "step": (step, "one training step of DCLGAN or U-GAT-IT beside the same step written plainly"),
    "kernels": (kernels, "the native ops beside the published formulations, torch.compile and the floor"),
    "share": (share, "the native ops' share of a training step, before and after"),
    "report": (report, "write docs/kernels.md and its plots from the measurements in docs/kernels/"),
}


def main() -> int:
    """Run the sub-command."""
    parser = argparse.ArgumentParser(description="Measure training on this machine.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
