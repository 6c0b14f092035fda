"""Measures: `python launchers/bench.py step --size 64 --batch 1`."""

from __future__ import annotations

import argparse
import sys

from i2i_dist.bench import step


def main() -> int:
    """Run the sub-command."""
    parser = argparse.ArgumentParser(description="Measure training on this machine.")
    commands = parser.add_subparsers(required=True, metavar="command")
    step_parser = commands.add_parser("step", help="one DCLGAN training step beside the same step written plainly")
    step.add_arguments(step_parser)
    step_parser.set_defaults(run=step.run)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
