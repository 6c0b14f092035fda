"""Every way to start a process gives it its place; half an environment is answered in a sentence."""

from __future__ import annotations

import pytest
import torch

from i2i_dist.distributed import (
    Ranks,
    adopt_environment,
    any_rank,
    barrier,
    from_first_rank,
    gather_texts,
    mean_over_ranks,
    rank_and_world,
)

DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
# As `srun` sets it inside a job; values of the job and of the step differ to tell which is read.
SRUN = {
    "SLURM_JOB_ID": "4242", "SLURM_NTASKS": "16", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "cpu[1-4]",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip


@pytest.mark.parametrize("given", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_launchers_that_set_everything_are_believed(given: dict[str, str]) -> None:
    environment = dict(given)
    assert adopt_environment(environment) == Ranks(5, 8, 1, 4)
    assert environment == given


def test_srun() -> None:
    environment = dict(SRUN)
    assert adopt_environment(environment) == Ranks(5, 8, 1, 4)
    added = {key: value for key, value in environment.items() if key not in SRUN}
    assert added == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + 4242),
    }  # fmt: skip


def test_an_address_that_is_given_is_kept_under_srun() -> None:
    environment = SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    adopt_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1234")


def test_all_tasks_of_a_step_meet_at_one_place() -> None:
    places = set()
    for rank in range(8):
        environment = SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 4)}
        assert adopt_environment(environment).rank == rank
        places.add((environment["MASTER_ADDR"], environment["MASTER_PORT"]))
    assert len(places) == 1


@pytest.mark.parametrize("job", ["1", "11999", "12000", "19999", "4294967295"])
def test_ports_are_ports(job: str) -> None:
    environment = SRUN | {"SLURM_JOB_ID": job}
    adopt_environment(environment)
    assert 20000 <= int(environment["MASTER_PORT"]) < 32768  # above, Linux gives them to connections


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[7]", "gpu7"),
        ("gpu[007-012,020]", "gpu007"),
        ("gpu[3,7-9]", "gpu3"),
        ("login,gpu[1-3]", "login"),
        ("gpu[1-3],login", "gpu1"),
        ("a-b-1", "a-b-1"),
        ("a-b-1,a-b-2", "a-b-1"),
        ("a-b-[1-2]", "a-b-1"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("gpu[1-2].cluster", "gpu1.cluster"),
        ("gpu[1-2].cluster,other", "gpu1.cluster"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    environment = SRUN | {"SLURM_STEP_NODELIST": nodes}
    adopt_environment(environment)
    assert environment["MASTER_ADDR"] == first


def test_plain_python_is_one_rank() -> None:
    environment: dict[str, str] = {"PATH": "/bin"}
    assert adopt_environment(environment) == Ranks(0, 1, 0, 1)
    assert (environment["MASTER_ADDR"], environment["WORLD_SIZE"]) == ("127.0.0.1", "1")
    assert 1024 <= int(environment["MASTER_PORT"]) < 65536
    assert adopt_environment(environment) == Ranks(0, 1, 0, 1), "and stays so when asked again"


def test_plain_python_in_a_batch_script_is_one_rank() -> None:
    """A batch script's own shell has the job's variables and SLURM_PROCID=0; no other task would ever come."""
    script = {key: value for key, value in SRUN.items() if "STEP" not in key} | {"SLURM_PROCID": "0"}
    assert adopt_environment(script) == Ranks(0, 1, 0, 1)


def test_one_task_of_srun_is_one_rank() -> None:
    assert adopt_environment(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Ranks(0, 1, 0, 1)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_a_sentence(missing: str) -> None:
    environment = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(ValueError, match=rf"is set, but {missing} is not; start with deepspeed, torchrun, srun"):
        adopt_environment(environment)


def test_outside_of_a_process_group_there_is_one_rank() -> None:
    assert rank_and_world() == (0, 1)
    barrier()
    assert any_rank(torch.tensor([0.0, 2.0, -1.0, float("nan")])) == [False, True, True, True]
    values = torch.tensor([1.0, 2.0])
    assert mean_over_ranks(values) is values
    assert gather_texts("x") == ["x"]
    assert from_first_rank("x") == "x"
