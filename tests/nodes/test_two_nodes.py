"""Training on two nodes: every launcher's form gives the weights of one node, and a cut cable ends the run on both."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from i2i_dist import checkpoint
from i2i_dist.data.synthetic import write_dataset
from tests import launch_files, needs
from tests.nodes.two_nodes import ADDRESSES, CABLE, HOSTS, SSH_SILENCE, Node, two_nodes, why_not
from tests.ranks import ROOT, free_port, rank_environment
from tests.train.runs import PATIENCE, SCRIPT, Started, checkpoints, finish, kill_all, launch, settings, write_config

IMAGES = 24  # what a run of the configuration sees
TIMEOUT = 8  # seconds: engine.timeout_seconds of the runs whose cable is cut
LATE = 5  # seconds that a busy machine may take to end a launcher
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}


class Cluster(NamedTuple):
    """Two nodes, a home directory for whoever starts runs on them, and what they train."""

    nodes: tuple[Node, Node]
    home: Path
    config: Path
    data: Path

    def start(self, run: Path, *commands: list[str]) -> list[Started]:
        """Run a command on each node, or on the first one alone."""
        environment = ENVIRONMENT | {"HOME": str(self.home)}
        return [
            launch(node.command(command), run.with_name(f"{run.name}_{node.name}.log"), environment)
            for node, command in zip(self.nodes, commands, strict=False)
        ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        needs.skip(reason)
    data, home = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("home")
    write_dataset(data, size=36, train=6, test=1, seed=3)
    config = write_config(tmp_path_factory.mktemp("configuration") / "dclgan.yaml", data)
    (home / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    # pdsh hands on Python's own variables and hardly any others: DeepSpeed has it set those in this file as well.
    (home / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    first_pod = launch_files.option(launch_files.pod_command(0), "master_addr")
    with two_nodes(tmp_path_factory.mktemp("nodes"), alias=first_pod) as nodes:
        try:
            yield Cluster(nodes, home, config, data)
        finally:
            kill_all()


def through_pdsh(cluster: Cluster, run: Path, words: list[str]) -> list[Started]:
    command = ["deepspeed", "--hostfile", str(cluster.home / "hosts"), "--master_addr", ADDRESSES[0], SCRIPT]
    return cluster.start(run, [*command, "--config", str(cluster.config), "--run", str(run), *words])


def without_ssh(cluster: Cluster, run: Path, words: list[str]) -> list[Started]:
    command = ["deepspeed", "--hostfile", str(cluster.home / "hosts"), "--no_ssh", "--master_addr", HOSTS[0]]
    options = [SCRIPT, "--config", str(cluster.config), "--run", str(run), *words]
    return cluster.start(run, *([*command, "--node_rank", str(rank), *options] for rank in range(2)))


def through_torchrun(cluster: Cluster, run: Path, words: list[str]) -> list[Started]:
    """As the pods of launchers/kubernetes.yaml do, but with one rank in each."""
    changed = {
        "restarts": 0,
        "nproc_per_node": 1,
        "config": cluster.config,
        "set": f"data.root={cluster.data}",
        "run_dir": run,
    }
    words = ["--set=train.global_batch=2", *words]  # as in the other forms; of one key the last counts
    return cluster.start(run, *([*launch_files.pod_command(rank, **changed), *words] for rank in range(2)))


FORMS = {"pdsh": through_pdsh, "no_ssh": without_ssh, "torchrun": through_torchrun}


def weights(run: Path) -> dict[str, str]:
    """Return a digest of each side's weights, moments and averages, and of each pool."""
    (checkpoint,) = run.glob(f"checkpoints/images_*{IMAGES}")
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}
    assert {"generator.safetensors", "discriminator.safetensors"} <= found.keys()
    return found


@pytest.fixture(scope="module")
def of_one_node(cluster: Cluster) -> dict[str, str]:
    """The weights that two ranks on one machine train."""
    run, port = cluster.home / "one_node", free_port()
    words = [sys.executable, SCRIPT, "--config", str(cluster.config), "--run", str(run)]
    logs = [run.with_name(f"one_node_{rank}.log") for rank in range(2)]
    codes, texts = finish([launch(words, log, rank_environment(rank, 2, port)) for rank, log in enumerate(logs)])
    assert codes == [0, 0], texts
    return weights(run)


@pytest.mark.parametrize("form", ["pdsh", pytest.param("no_ssh", marks=pytest.mark.soak)])
def test_two_nodes_train_the_weights_of_one(cluster: Cluster, of_one_node: dict[str, str], form: str) -> None:
    run = cluster.home / form
    codes, texts = finish(FORMS[form](cluster, run, []))
    assert not any(codes), texts
    assert "2 nodes, 2 ranks on " in texts[0]
    assert weights(run) == of_one_node


def seconds_until_gone(there: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Wait until nothing of what is named is there any more; return how long each was."""
    begun, gone = time.monotonic(), dict[str, float]()
    while len(gone) < len(there):
        time.sleep(0.1)
        after = time.monotonic() - begun
        gone.update({name: after for name, look in there.items() if name not in gone and not look()})
        assert after < PATIENCE, f"of {', '.join(there)} only these have ended: {gone}"
    return gone


@pytest.mark.parametrize("form", ["torchrun", pytest.param("pdsh", marks=pytest.mark.soak)])
def test_a_cut_cable_ends_the_run_on_both_nodes(cluster: Cluster, of_one_node: dict[str, str], form: str) -> None:
    """The ranks end at the configured time, and their launchers with them; that of pdsh when its ssh has given up."""
    run = cluster.home / f"cut_{form}"
    endless = settings(schedule__constant_epochs=5000, output__keep_checkpoints=1000, engine__timeout_seconds=TIMEOUT)
    started = FORMS[form](cluster, run, endless)
    started[0].wait_for(f"images_{IMAGES:012d}. It took")  # it is on the disk
    assert "2 nodes, 2 ranks on " in started[0].text
    ranks = {f"rank on {node.name}": functools.partial(node.running, f" -u {SCRIPT}") for node in cluster.nodes}
    assert [count() for count in ranks.values()] == [1, 1]
    cluster.nodes[1].plug(connected=False)
    try:
        seconds = seconds_until_gone(ranks | {"launchers": lambda: [one for one in started if one.poll() is None]})
    finally:
        cluster.nodes[1].plug(connected=True)
    print(f"After the cut, {form}: {seconds}")
    assert max(seconds[name] for name in ranks) < TIMEOUT, seconds
    assert seconds["launchers"] < TIMEOUT + LATE + SSH_SILENCE, seconds
    codes, texts = finish(started)
    assert all(codes), texts
    assert weights(run) == of_one_node


def below(run: Started, program: str) -> psutil.Process:
    """Return the process of a run that has the name of this program among its first words."""
    family = psutil.Process(run.pid).children(recursive=True)
    (found,) = [one for one in family if any(Path(word).name == program for word in one.cmdline()[:2])]
    return found


def last_log_point(run: Path) -> int:
    return int(json.loads((run / "stats.jsonl").read_text().splitlines()[-1])["images_seen"])


@pytest.mark.soak
def test_a_supervisor_of_ranks_behind_ssh(cluster: Cluster) -> None:
    """Its pdsh is killed, and the front end answers 0: the ranks save, and are started again. Then it gets SIGTERM."""
    run = cluster.home / "supervised"
    command = ["deepspeed", "--hostfile", str(cluster.home / "hosts"), "--master_addr", ADDRESSES[0], SCRIPT]
    endless = settings(schedule__constant_epochs=5000, output__checkpoint_every_images=100_000)
    words = [*command, "--config", str(cluster.config), "--run", str(run), *endless]
    (started,) = cluster.start(run, ["python", "launchers/supervise.py", "--restarts", "3", "--", *words])
    ranks = {f"rank on {node.name}": functools.partial(node.running, f" -u {SCRIPT}") for node in cluster.nodes}

    started.wait_for("img 8/")
    assert [count() for count in ranks.values()] == [1, 1]
    below(started, "pdsh").kill()
    print(f"pdsh was killed: {seconds_until_gone(ranks)}")
    saved = last_log_point(run)
    assert checkpoints(run) == [f"images_{saved:012d}"]
    started.wait_for("the command ended with exit code 1; restart 1 of 3")

    started.wait_for(f"img {saved + 4}/")
    assert [count() for count in ranks.values()] == [1, 1]
    below(started, "supervise.py").send_signal(signal.SIGTERM)
    seconds = seconds_until_gone(ranks)
    print(f"The supervisor was terminated: {seconds}")
    assert max(seconds.values()) < 30
    assert started.wait() == 75, started.text
    saved = last_log_point(run)
    assert checkpoints(run)[-1] == f"images_{saved:012d}"
    checkpoint.verify(run / "checkpoints" / checkpoints(run)[-1])
