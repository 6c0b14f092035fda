"""Measures: `python launchers/bench.py step --size 64 --batch 1`, and the other sub-commands that `--help` lists."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "step": "one training step of DCLGAN or U-GAT-IT beside the same step written plainly",
    "kernels": "the native ops beside the published formulations, torch.compile and the floor",
    "share": "the native ops' share of a training step, before and after",
    "report": "write docs/kernels.md and its plots from the measurements in docs/kernels/",
    "scaling": "a configuration's update on 1, 2, 4 ranks here, taken apart, and a model of it on many GPUs",
    "scaling-page": "count every method's update, and write docs/scaling.md from docs/scaling/ and the model",
}


def main() -> int:
    """Run the sub-command."""
    parser = argparse.ArgumentParser(description="Measure training on this machine.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in sys.argv[1:2]:  # the others are not loaded: some bring DeepSpeed, which what is measured may lack
            module = importlib.import_module(f"i2i_dist.bench.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
