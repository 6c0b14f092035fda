"""The trainer's command line: its few options, answers to habits from other trainers, and the command that resumes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from i2i_dist import supervise
from i2i_dist.config import ConfigError
from i2i_dist.distributed import Ranks

# What people type by habit from other trainers, and what it is called here.
_HABITS = {
    "dataroot": "data.root", "load_size": "data.load_size", "crop_size": "data.crop_size", "workers": "data.workers",
    "batch_size": "train.global_batch", "batch": "train.global_batch", "seed": "train.seed",
    "n_epochs": "schedule.constant_epochs", "n_epochs_decay": "schedule.decay_epochs", "model": "method.name",
    "lr": "method.lr", "lambda_NCE": "method.lambda_nce", "pool_size": "method.pool_size",
    "num_threads": "data.workers", "mixed_precision": "train.precision",
}  # fmt: skip
_OTHER_HABITS = {
    "name": "write --run DIRECTORY", "checkpoints_dir": "write --run DIRECTORY",
    "gpu_ids": "write deepspeed --num_gpus N",
    "continue_train": "leave it out: a run goes on from its newest checkpoint by itself",
}  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: An option that is not known, with its name here where it is a habit from another trainer; or
            --fresh where each restart would begin one more run.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train an image-to-image translation GAN.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change one key"
    )
    # torchrun takes --run for the beginning of an option of its own, hence the second name.
    parser.add_argument(
        "--run", "--run-dir", metavar="DIR", help="the run's directory (default: runs/ and the configuration's name)"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|CHECKPOINT", help="where to go on from (default: auto)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over in a new directory beside the run's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # habits that do no harm
    parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        value = value or (unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "VALUE")
        hint = _OTHER_HABITS.get(name, "see --help; all else is --set KEY=VALUE")
        if name in _HABITS:
            hint = f"write --set {shlex.quote(f'{_HABITS[name]}={value}')}"
        raise ConfigError(f"{unknown[0]} is not an option here; {hint}")
    if options.fresh and not options.dry_run and supervise.may_start_again(os.environ):
        raise ConfigError(
            "--fresh: this command is started again when it fails, and would start over at each restart; leave it out, "
            "and name a new directory: --run DIR"
        )
    return options


def resume_command(arguments: Sequence[str], directory: Path, ranks: Ranks) -> str:
    """Return the command that goes on with this run, in the words it was started with."""
    # The directory may be one that --fresh chose, and the run goes on from its own newest checkpoint.
    dropped = ("--run", "--run-dir", "--resume", "--local_rank")
    kept: list[str] = []
    words = iter(argument for argument in arguments if argument != "--fresh")
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in dropped:
            kept.append(word)
        elif not equals:
            next(words, None)
    count, port = ranks.local_world, os.environ.get("MASTER_PORT", "29500")
    nodes = max(1, ranks.world // ranks.local_world)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc_per_node={count}"]
    elif "CROSS_RANK" in os.environ:
        launcher = ["deepspeed", *([f"--num_nodes={nodes}"] if nodes > 1 else []), f"--num_gpus={count}"]
    else:
        launcher = ["srun"] if "SLURM_PROCID" in os.environ and ranks.world > 1 else []
        return shlex.join([*launcher, sys.orig_argv[0], sys.argv[0], *kept, "--run", str(directory)])
    if port != "29500":
        launcher.append(f"--master_port={port}")
    option = "--run-dir" if launcher[0] == "torchrun" else "--run"  # see `parse`
    return shlex.join([*launcher, sys.argv[0], *kept, option, str(directory)])
