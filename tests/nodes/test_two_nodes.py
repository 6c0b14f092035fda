"""Training on two nodes: every launcher's form gives the weights of one node, and a cut cable ends the run on both."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from i2i_dist.data.synthetic import write_dataset
from tests.nodes.two_nodes import ADDRESSES, CABLE, HOSTS, SSH_SILENCE, Node, two_nodes, why_not
from tests.ranks import ROOT, free_port, rank_environment
from tests.train.runs import PATIENCE, SCRIPT, Started, finish, kill_all, launch, settings, write_config

TIMEOUT = 8  # seconds: engine.timeout_seconds of the run whose cable is cut
IMAGES = 24
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}


class Cluster(NamedTuple):
    """Two nodes, and a directory from which runs are started on them."""

    nodes: tuple[Node, Node]
    home: Path
    config: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        if "I2I_DIST_REQUIRE_NODES" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    data, home = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("home")
    write_dataset(data, size=36, train=6, test=1, seed=3)
    config = write_config(tmp_path_factory.mktemp("configuration") / "dclgan.yaml", data)
    (home / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    # pdsh hands on no more of the environment than Python's own variables: DeepSpeed reads the others from here.
    (home / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    with two_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        try:
            yield Cluster(nodes, home, config)
        finally:
            kill_all()


def start_everywhere(cluster: Cluster, name: str, words: list[list[str]]) -> list[Started]:
    """Run a command on each node that has one."""
    return [
        launch(node.command(command, cluster.home), cluster.home / f"{name}_{node.name}.log", ENVIRONMENT)
        for node, command in zip(cluster.nodes, words, strict=False)
    ]


def through_pdsh(cluster: Cluster, words: list[str]) -> list[Started]:
    command = ["deepspeed", "--hostfile", "hosts", "--master_addr", ADDRESSES[0], *words, "--run"]
    return start_everywhere(cluster, "pdsh", [[*command, str(cluster.home / "pdsh")]])


def without_ssh(cluster: Cluster, words: list[str]) -> list[Started]:
    command = ["deepspeed", "--hostfile", "hosts", "--no_ssh", "--master_addr", HOSTS[0]]
    run = [*words, "--run", str(cluster.home / "no_ssh")]
    return start_everywhere(cluster, "no_ssh", [[*command, "--node_rank", str(rank), *run] for rank in range(2)])


def through_torchrun(cluster: Cluster, words: list[str]) -> list[Started]:
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", HOSTS[0]]
    run = [*words, "--run-dir", str(cluster.home / "torchrun")]
    return start_everywhere(cluster, "torchrun", [[*command, "--node_rank", str(rank), *run] for rank in range(2)])


FORMS = {"pdsh": through_pdsh, "no_ssh": without_ssh, "torchrun": through_torchrun}


def command_line(cluster: Cluster, **values: object) -> list[str]:
    return [str(ROOT / SCRIPT), "--config", str(cluster.config), *settings(**values)]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints").glob(f"*{IMAGES}/*.safetensors"))}


@pytest.fixture(scope="module")
def on_one_node(cluster: Cluster) -> dict[str, bytes]:
    """The weights of two ranks on this machine."""
    run, port = cluster.home / "one_node", free_port()
    words = [sys.executable, *command_line(cluster), "--run", str(run)]
    ranks = [
        launch(words, cluster.home / f"one_node_{rank}.log", rank_environment(rank, 2, port)) for rank in range(2)
    ]
    codes, texts = finish(ranks)
    assert codes == [0, 0], texts
    found = weights(run)
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("form", FORMS)
def test_two_nodes_train_the_weights_of_one(cluster: Cluster, on_one_node: dict[str, bytes], form: str) -> None:
    begun = time.monotonic()
    codes, texts = finish(FORMS[form](cluster, command_line(cluster)))
    print(f"{form}: {time.monotonic() - begun:.1f} s")
    assert set(codes) == {0}, texts
    assert "2 nodes, 2 ranks on " in texts[0]
    assert weights(cluster.home / form) == on_one_node


def test_a_cut_cable_ends_the_run_on_both_nodes(cluster: Cluster) -> None:
    """The ranks end by themselves at the configured time, and the front end when its ssh has given up."""
    words = command_line(cluster, schedule__constant_epochs=5000, engine__timeout_seconds=TIMEOUT)
    (front_end,) = through_pdsh(cluster, [*words, "--fresh"])
    front_end.wait_for(f"img {IMAGES}/")
    near, far = cluster.nodes
    assert near.running("train.py") and far.running("train.py")
    far.plug(connected=False)
    begun, ended = time.monotonic(), dict[str, float]()
    while len(ended) < 3:
        after = time.monotonic() - begun
        for name, there in (
            ("near", near.running("launchers/train.py --local_rank")),
            ("far", far.running("launchers/train.py --local_rank")),
            ("front end", front_end.poll() is None),
        ):
            if not there:
                ended.setdefault(name, after)
        assert after < PATIENCE, f"only {ended} ended:\n{front_end.text[-4000:]}"
        time.sleep(0.1)
    print(json.dumps(ended))
    assert front_end.wait() not in (0, 2, 75), front_end.text
    assert ended["near"] < TIMEOUT + 5 and ended["far"] < TIMEOUT + 5, ended
    assert ended["front end"] < TIMEOUT + SSH_SILENCE + 10, ended
    far.plug(connected=True)
