"""Every way to start a run trains, on the same images in the same order."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from i2i_dist.command_line import parse, resume_command
from i2i_dist.distributed import Ranks
from tests.ranks import free_port
from tests.train.runs import SCRIPT, Started, checkpoints, finish, launch, rows, settings, start

NO_POOL = settings(method__pool_size=0)  # a pool belongs to its rank, so it differs between world sizes


class Launched(NamedTuple):
    text: str
    run: Path

    @property
    def losses(self) -> list[dict[str, float]]:
        return [row["losses"] for row in rows(self.run)]


def port_of_a_slurm_job() -> int:
    while not 20000 <= (port := free_port()) < 40000:
        pass
    return port


def as_slurm_does(words: list[str], log: Path) -> list[Started]:
    shared = {
        "SLURM_JOB_ID": str(port_of_a_slurm_job() - 20000),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
    }
    return [
        start(words, log.with_name(f"slurm_{rank}"), shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def launched(dclgan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    """One run of twelve updates for each launcher."""
    root = tmp_path_factory.mktemp("launched")
    (root / "extensions").mkdir()
    # Slowly, or rounding, which differs by processor and number of ranks, grows within a dozen updates beyond what
    # tells pictures apart.
    words = [SCRIPT, "--config", str(dclgan), *NO_POOL, *settings(method__lr=1e-7, method__lr_heads=1e-7)]
    commands = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *words, "--run"],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), *words, "--run-dir"],
        "python": ["python", *words, "--run"],
    }
    found = {}
    for name, command in commands.items():
        environment = {"TORCH_EXTENSIONS_DIR": str(root / "extensions")}
        process = launch([*command, str(root / name)], root / f"{name}_log", environment)
        assert process.wait() == 0, process.text
        found[name] = Launched(process.text, root / name)
    codes, texts = finish(as_slurm_does([*words[1:], "--run", str(root / "srun")], root / "log"))
    assert codes == [0, 0], texts
    found["srun"] = Launched(texts[0], root / "srun")
    assert list((root / "extensions").iterdir()) == [], "something was compiled"
    return found


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "python", "srun"])
def test_trains(launched: dict[str, Launched], name: str) -> None:
    ranks, split = ("1 rank", "2 micro x 1 accumulation x 1 world = 2 global") if name == "python" else (
        "2 ranks", "1 micro x 1 accumulation x 2 world = 2 global"
    )  # fmt: skip
    text, run = launched[name]
    assert f"1 node, {ranks} on " in text and split in text
    assert text.count("Done: 24 images seen.") == 1
    assert [row["images_seen"] for row in rows(run)] == list(range(2, 25, 2))
    assert checkpoints(run)[0] == "images_000000000008" and checkpoints(run)[-1] == "images_000000000024"
    assert (run / "samples" / "images_000000000024.png").stat().st_size > 0
    assert (run / "config.yaml").exists()
    assert "Traceback" not in text


def test_launchers_make_no_difference(launched: dict[str, Launched]) -> None:
    for name in ("torchrun", "srun"):
        assert launched[name].losses == launched["deepspeed"].losses
        for side in ("generator", "discriminator"):
            one, other = (
                launched[run].run / "checkpoints" / "images_000000000024" / f"{side}.safetensors"
                for run in (name, "deepspeed")
            )
            assert one.read_bytes() == other.read_bytes()


def test_one_rank_sees_what_two_see(launched: dict[str, Launched]) -> None:
    """The losses of each update are a fingerprint of its images: those of other updates are far away."""
    one, two = launched["python"].losses, launched["deepspeed"].losses
    for update, losses in enumerate(one):
        apart = [max(abs(losses[name] - other[name]) for name in losses) for other in two]
        assert apart[update] < 1e-3
        assert min(apart[:update] + apart[update + 1 :]) > 5e-3


def test_the_command_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    monkeypatch.setattr(sys, "orig_argv", ["python3", SCRIPT])
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    words = ["--local_rank=1", "--config", "c.yaml", "--fresh", "--run", "x", "--set", "a.b=[1, 2]", "--resume", "y"]
    rest = f"{SCRIPT} --config c.yaml --set 'a.b=[1, 2]'"

    def command(world: int = 2, local_world: int = 2) -> str:
        text = resume_command(words, Path("x-2"), Ranks(0, world, 0, local_world))
        again = parse(shlex.split(text.partition(SCRIPT)[2]))
        assert (again.run, again.resume, again.fresh) == ("x-2", "auto", False)
        return text

    assert command(1, 1) == f"python3 {rest} --run x-2"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert command() == f"srun python3 {rest} --run x-2"
    monkeypatch.setenv("CROSS_RANK", "0")
    assert command() == f"deepspeed --num_gpus=2 {rest} --run x-2"
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert command(4, 2) == f"deepspeed --num_nodes=2 --num_gpus=2 --master_port=29501 {rest} --run x-2"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert command() == f"torchrun --nproc_per_node=2 --master_port=29501 {rest} --run-dir x-2"


def test_zero_3_in_bf16_stops_and_goes_on_at_zero_0_in_fp32_on_one_rank(dclgan: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank stops both, and `deepspeed` passes the exit code on."""
    sharded = settings(
        engine__generator_stage=3, engine__discriminator_stage=3, train__precision="bf16",
        engine__generator_offload=True, engine__checkpoint_activations=True,
    )  # fmt: skip
    words = ["--config", str(dclgan), "--run", str(tmp_path / "run"), *settings(schedule__constant_epochs=5000)]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), SCRIPT, *words, *sharded]
    process = launch(command, tmp_path / "log")
    process.wait_for("img 8/")
    family = psutil.Process(process.pid).children(recursive=True)
    (rank_1,) = [one for one in family if "--local_rank=1" in one.cmdline()]
    os.kill(rank_1.pid, signal.SIGTERM)
    assert process.wait() == 75, process.text
    assert (
        "bf16" in process.text
        and "ZeRO stage generator 3 offloaded, discriminator 3; blocks recomputed" in process.text
    )
    assert "Traceback" not in process.text
    stopped = int(re.findall(r"Saved \S+images_(\d+)\.", process.text)[-1])
    assert stopped == rows(tmp_path / "run")[-1]["images_seen"]

    epochs = (stopped + 8) // 8
    again = start([*words, *settings(schedule__constant_epochs=epochs, train__precision="fp32")], tmp_path / "again")
    assert again.wait() == 0, again.text
    assert "engine.generator_stage: 3 -> 0" in again.text and "train.precision: bf16 -> fp32" not in again.text
    assert "1 rank on " in again.text and "resumes at image" in again.text
    assert [row["images_seen"] for row in rows(tmp_path / "run")] == list(range(2, epochs * 8 + 1, 2))
