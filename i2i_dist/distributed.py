"""Which rank this process is, and the few things that ranks tell each other outside of DeepSpeed."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    """This process among all processes of the run."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def adopt_environment(environment: MutableMapping[str, str]) -> Ranks:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from whatever started this process.

    `deepspeed` and `torchrun` set them; under `srun` they come from SLURM's variables; plain `python` is one rank.

    Raises:
        ValueError: The launcher set some of them and not the others.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise ValueError(
                f"RANK or WORLD_SIZE is set, but {', '.join(missing)} is not; start with deepspeed, torchrun, srun or "
                "plain python, or unset RANK and WORLD_SIZE"
            )
        environment.setdefault("LOCAL_RANK", "0")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Of the step: srun alone sets it, while a batch script's own shell has the job's SLURM_NTASKS and SLURM_PROCID.
        _adopt_slurm(environment)
    else:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        environment["MASTER_PORT"] = str(_free_port())
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_world = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", str(world)))
    return Ranks(rank, world, int(environment["LOCAL_RANK"]), int(local_world))


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    tasks = environment["SLURM_STEP_NUM_TASKS"]
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(max(1, int(tasks) // nodes)),
    )
    environment.setdefault("MASTER_ADDR", _first_host(environment))
    # Every rank must compute the same port without talking, and two jobs on a node should not meet on it. From 32768 on
    # Linux gives ports to connections of any program.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 12000))


def _first_host(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    nodes = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes)  # "gpu[007-012,020],login" -> "gpu007,login"
    return nodes.split(",")[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) outside of a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def any_rank(flags: torch.Tensor) -> list[bool]:
    """Return, for each element of a 1-D tensor, whether it is not zero on any rank. One collective, one wait."""
    flags = flags.float()
    if rank_and_world()[1] > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all ranks."""
    _, world = rank_and_world()
    if world > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world
    return values


def gather_numbers(values: torch.Tensor) -> torch.Tensor:
    """Return every rank's 1-D tensor of the same length as a row, in the order of ranks, on every rank."""
    _, world = rank_and_world()
    if world == 1:
        return values[None]
    rows = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def gather_texts(text: str) -> list[str]:
    """Return every rank's text, in the order of ranks, on every rank."""
    _, world = rank_and_world()
    if world == 1:
        return [text]
    texts: list[str] = [""] * world
    dist.all_gather_object(texts, text)
    return texts


def from_first_rank(text: str) -> str:
    """Return rank 0's text on every rank."""
    if rank_and_world()[1] == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]
