"""The supervisor: signals reach the ranks and nothing else, failures are started again, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from i2i_dist import supervise
from tests.ranks import ROOT, free_port
from tests.train.runs import SCRIPT, Started, checkpoints, finish, launch, settings, start_ranks
from tests.train.test_signals import ENDLESS, assert_saved_where_it_stopped

SUPERVISE = ["python", "launchers/supervise.py"]
FAKE_RANK = ["python", "-S", str(ROOT / "tests" / "train" / "fake_rank.py")]


def until(met: Callable[[], bool], patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def supervised(tmp_path: Path, options: list[str], *script: str) -> Started:
    """A supervised shell that stands for a launcher; `RANK LOG` in its script starts a fake rank."""
    text = "\n".join(script).replace("RANK", shlex.join(FAKE_RANK))
    return launch([*SUPERVISE, *options, "--", "sh", "-c", text], tmp_path / "console")


def lines(log: Path, word: str) -> list[str]:
    return [line for line in log.read_text().splitlines() if word in line] if log.exists() else []


def test_a_signal_reaches_each_rank_once_and_nothing_else(tmp_path: Path) -> None:
    """The shell between them has no handler and would end at once; another job's process reports as a rank does."""
    ranks = [tmp_path / "0", tmp_path / "1"]
    run = supervised(tmp_path, [], f"RANK {ranks[0]} until_told &", f"RANK {ranks[1]} until_told", "wait", "exit 9")
    until(lambda: all(lines(rank, "started") for rank in ranks))
    words = "from i2i_dist import supervise; supervise.register(); print('registered', flush=True); input()"
    variable = {supervise.VARIABLE: lines(ranks[0], "started")[0].split()[2]}
    with subprocess.Popen(
        [sys.executable, "-S", "-c", words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variable,
    ) as stranger:
        assert stranger.stdout and stranger.stdout.readline() == b"registered\n"
        run.signal(signal.SIGUSR1)
        until(lambda: bool(lines(ranks[0], "heard")))
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.text  # not the shell's 9: the ranks know better
        assert stranger.poll() is None
        stranger.communicate(b"\n")
    for rank in ranks:
        assert lines(rank, "heard") == ["heard SIGUSR1", "heard SIGTERM"]
    run.wait_until_gone()


def test_what_fails_is_started_again_up_to_n_times(tmp_path: Path) -> None:
    """Each try waits for the last process of the one before, a session of its own and all."""
    log = tmp_path / "rank"
    run = supervised(tmp_path, ["--restarts", "2"], f"setsid RANK {log} 1 & sleep 0.2", "exit 1")
    assert run.wait() == 1
    assert re.findall(r"restart . of 2 in . s", run.text) == ["restart 1 of 2 in 1 s", "restart 2 of 2 in 2 s"]
    assert "and no restart is left" in run.text
    started = [line.split() for line in lines(log, "started")]
    pids = {int(words[1]) for words in started}
    assert len(pids) == 3 and not any(psutil.pid_exists(pid) for pid in pids)
    assert [words[3:] for words in started] == [["0", "2"], ["1", "2"], ["2", "2"]]  # what the ranks are told


@pytest.mark.parametrize(("code", "answer"), [("0", 0), ("2", 2), ("75", 75)])
def test_what_must_not_be_started_again_is_not(tmp_path: Path, code: str, answer: int) -> None:
    """As under torchrun, whose own code is 1 whatever its ranks say."""
    run = supervised(tmp_path, ["--restarts", "2"], f"RANK {tmp_path / 'rank'} {code} && exit 0", "exit 1")
    assert run.wait() == answer, run.text
    assert len(lines(tmp_path / "rank", "started")) == 1


@pytest.mark.parametrize("number", supervise.STOP_SIGNALS)
def test_srun_is_told_in_the_one_way_that_it_hands_on(tmp_path: Path, number: int) -> None:
    """It kills its tasks at SIGTERM, and tells of them at SIGINT."""
    log, srun = tmp_path / "rank", tmp_path / "srun"
    rank = shlex.join([*FAKE_RANK, str(log), "until_told"])
    traps = "trap 'kill -9 $rank' TERM\ntrap : INT\ntrap 'kill -USR1 $rank' USR1\n"
    wait = "while kill -0 $rank 2>/dev/null; do wait $rank; done\nwait $rank\n"
    srun.write_text(f"#!/bin/bash\n{rank} & rank=$!\n{traps}{wait}")
    srun.chmod(0o755)
    run = launch([*SUPERVISE, "--", str(srun)], tmp_path / "console")
    until(lambda: bool(lines(log, "started")))
    run.signal(number)
    assert run.wait() == 75, run.text
    assert lines(log, "heard") == ["heard SIGUSR1"]


def test_a_run_that_is_asked_and_killed_before_it_has_saved_can_be_queued_again(tmp_path: Path) -> None:
    """What was saved before is there."""
    log, told = tmp_path / "rank", tmp_path / "told"
    run = supervised(
        tmp_path, [], f"RANK {log} deaf &", f"until [ -e {told} ]", "do sleep 0.1", "done", "kill -9 $!", "exit 137"
    )
    until(lambda: bool(lines(log, "started")))
    run.signal(signal.SIGTERM)
    until(lambda: bool(lines(log, "heard")))
    told.touch()
    assert run.wait() == 75, run.text


def test_a_terminal_that_is_closed_ends_no_supervisor(tmp_path: Path) -> None:
    log = tmp_path / "rank"
    run = supervised(tmp_path, [], f"RANK {log} until_told")
    until(lambda: bool(lines(log, "started")))
    run.signal(signal.SIGHUP)
    time.sleep(0.5)
    assert run.poll() is None
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.text


def test_a_mistake_in_the_command_line_is_not_started_again(tmp_path: Path) -> None:
    """As under torchrun, whose own code is 1."""
    train = shlex.join([sys.executable, SCRIPT, "--resume"])
    run = supervised(tmp_path, ["--restarts", "2"], f"{train} || exit 1")
    assert run.wait() == 2, run.text
    assert "expected one argument" in run.text


def test_what_does_not_end_in_its_grace_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "rank"
    run = supervised(tmp_path, ["--grace", "0.5", "--restarts", "1"], f"setsid RANK {log} deaf & RANK {log} deaf")
    until(lambda: len(lines(log, "started")) == 2)
    begun = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.text
    assert time.monotonic() - begun > 0.5
    assert "did not end within the grace of 0.5 s; killed its processes" in run.text
    assert not any(psutil.pid_exists(int(line.split()[1])) for line in lines(log, "started"))


def test_a_signal_before_there_is_a_rank_ends_the_start(tmp_path: Path) -> None:
    run = supervised(tmp_path, ["--restarts", "1"], f"touch {tmp_path / 'there'}", "sleep 600")
    until((tmp_path / "there").exists)
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.text
    assert "nothing to save here" in run.text
    run.wait_until_gone()


def test_a_launcher_that_is_killed_is_started_again_though_its_ranks_have_saved(tmp_path: Path) -> None:
    """The first try loses its launcher, and its rank leaves with 75 by itself; the second one ends well."""
    log = tmp_path / "rank"
    first = f"RANK {log} 75 & kill -9 $$"
    run = supervised(tmp_path, ["--restarts", "1"], f"if [ -e {log} ]", f"then RANK {log} 0", f"else {first}", "fi")
    assert run.wait() == 0, run.text
    assert "ended with exit code 137; restart 1 of 1" in run.text


@pytest.mark.parametrize("answer", ["0", "75"])
def test_a_part_of_a_launcher_that_is_killed_is_started_again(tmp_path: Path, answer: str) -> None:
    """The rest of it answers as if somebody had asked the run to stop; one rank knows better, the other need not."""
    log = tmp_path / "rank"
    first = f"RANK {log} lost; RANK {log} 75; exit {answer}"
    run = supervised(tmp_path, ["--restarts", "1"], f"if [ -e {log} ]", f"then RANK {log} 0", f"else {first}", "fi")
    assert run.wait() == 0, run.text
    assert "ended with exit code 1; restart 1 of 1" in run.text


@pytest.mark.parametrize("first", ["1", "deaf & sleep 1; kill -9 $!; wait $!"])
def test_a_launcher_that_has_started_its_ranks_again_is_believed(tmp_path: Path, first: str) -> None:
    """As torchrun --max-restarts does: what became of the ranks before is no news."""
    log = tmp_path / "rank"
    run = supervised(tmp_path, [], f"RANK {log} {first}", f"RANK {log} 0 & RANK {log} 0", "wait", "exit 0")
    assert run.wait() == 0, run.text


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("exit 0", 1),
        ("exit 0 # deepspeed --hostfile FILE --no_ssh", 1),
        ("exit 0 # deepspeed --hostfile FILE", 0),
        ("(sleep 0.2; exit 75) & exit 0 # deepspeed --hostfile FILE", 1),
        ("sleep 0.2 & exit 0 # deepspeed --hostfile FILE", 0),
        ("sleep 60 & exit 0 # deepspeed --hostfile FILE", 1),
        ("bash -c 'exec -a \"ssh: /x [mux]\" sleep 60' & exit 0 # deepspeed --hostfile FILE", 0),  # of ControlPersist
    ],
)
def test_success_without_a_report_is_believed_where_ranks_are_started_by_ssh(
    tmp_path: Path, script: str, answer: int
) -> None:
    """But for connections that have outlived what had opened them: pdsh was killed, and deepspeed answers 0."""
    run = supervised(tmp_path, ["--grace", "1"], script)
    assert run.wait() == answer, run.text


def test_ranks_that_ssh_starts_cannot_be_told_of_restarts(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--fresh", "--resume=runs/x/checkpoints/images_000000000008"):
        with pytest.raises(SystemExit) as ended:
            supervise.main(["--restarts", "1", "--", "deepspeed", "--hostfile=hosts", "launchers/train.py", word])
        assert ended.value.code == 2
        assert f"{word} with --hostfile: each restart would go back again" in capsys.readouterr().err


def test_a_console_that_is_gone_ends_no_supervisor(tmp_path: Path) -> None:
    log = tmp_path / "rank"
    command = [*SUPERVISE[1:], "--restarts", "2", "--", *FAKE_RANK, str(log), "1"]
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(60) == 1
    assert len(lines(log, "started")) == 3


def test_a_console_that_nobody_reads_keeps_nothing_alive(tmp_path: Path) -> None:
    log, (reader, writer) = tmp_path / "rank", os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = [sys.executable, *SUPERVISE[1:], "--grace", "0.5", "--", *FAKE_RANK, str(log), "deaf"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=writer) as process, open(reader, "rb") as console:
        os.close(writer)
        until(lambda: bool(lines(log, "started")))
        process.send_signal(signal.SIGTERM)
        rank = psutil.Process(int(lines(log, "started")[0].split()[1]))
        until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, 20)
        assert b"did not end within the grace" in console.read()
        assert process.wait(60) == 75


def test_a_rank_knows_a_supervisor_above_it_that_cannot_be_told(tmp_path: Path) -> None:
    """A variable of another machine, whose process is not above this one, is no fault."""
    words = "import os; from i2i_dist import supervise; pid, _, name = os.environ[supervise.VARIABLE].partition(':')"
    for value in ("f'{pid}:{name}'", "f'{pid}:gone'", "f'{2**22 + 1}:gone'"):
        words += f"; os.environ[supervise.VARIABLE] = {value}; print(supervise.register())"
    run = supervised(tmp_path, [], f"python -S -c {shlex.quote(words)}", "wait")
    run.wait()
    assert run.text.split()[:3] == ["True", "False", "True"], run.text


def test_a_launcher_that_claims_success_without_its_ranks_is_not_believed(tmp_path: Path) -> None:
    """The deepspeed command answers 0 when its own child is killed, and all ranks with it."""
    log = tmp_path / "rank"
    run = supervised(tmp_path, [], f"RANK {log} deaf &", f"while [ ! -e {log} ]", "do sleep 0.1", "done", "kill -9 $!")
    assert run.wait() == 1, run.text


def test_a_lost_supervisor_is_seen_from_below_its_launcher(tmp_path: Path) -> None:
    """The rank's own parent lives on."""
    words = "import time; from i2i_dist import processes, supervise; top = supervise.supervisor()"
    watch = f"{words}; chain = processes.ancestors_up_to(top); print(len(chain), flush=True)\n" + (
        "while processes.ancestors_up_to(top) == chain: time.sleep(0.01)\nprint('lost', flush=True)"
    )
    run = supervised(tmp_path, [], f"python -S -c {shlex.quote(watch)}", "wait")
    run.wait_for("2\n")
    run.signal(signal.SIGKILL)
    until(lambda: "lost" in run.text)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--restarts", "3"], "no command; write it behind --"),
        (["--restarts", "-1", "--", "true"], "--restarts: given -1, allowed is 0 or more"),
        (["--grace", "nan", "--", "true"], "--grace: given nan, allowed is 0 or more seconds"),
        (["deepspeed", "launchers/train.py"], "deepspeed is not an option here; the command stands behind --"),
    ],
)
def test_command_line(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        supervise.main(words)
    assert ended.value.code == 2
    assert answer in capsys.readouterr().err


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    run = launch([*SUPERVISE, "--restarts", "3", "--", "./not_there"], tmp_path / "console")
    assert run.wait() == 2
    assert run.text == "supervise.py: ./not_there: No such file or directory.\n"


def test_a_supervisor_costs_no_torch() -> None:
    words = "import sys, i2i_dist.supervise; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", words], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


# ------------------------------------------------------------------------------------------------------- real launchers


@contextmanager
def family_of(run: Started) -> Iterator[list[psutil.Process]]:
    """All processes below a run; those that are left in the end are killed, and that is a failure."""
    family = psutil.Process(run.pid).children(recursive=True)
    try:
        yield family
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left
    finally:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


LOST = "The launcher that started this rank is gone: the run saves and ends."


def test_deepspeed_is_killed_and_comes_back_and_is_stopped(dclgan: Path, tmp_path: Path) -> None:
    """Its launch.py is killed, and the front end answers 0: the ranks save by themselves. The next try gets SIGTERM."""
    run = tmp_path / "run"
    words = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), SCRIPT, "--config", str(dclgan)]
    process = launch([*SUPERVISE, "--restarts", "1", "--", *words, "--run", str(run), *ENDLESS], tmp_path / "console")
    process.wait_for("img 8/")
    with family_of(process) as family:
        launchers = family[:2]
        assert "deepspeed.launcher.launch" in launchers[1].cmdline() and len(family) >= 4
        begun = time.monotonic()
        launchers[1].kill()
        process.wait_for("restart 1 of 1")
        gone = time.monotonic() - begun
        assert gone < 30
        assert "ended with exit code 1; restart" in process.text  # not 75: nobody has asked for it
    # All leave as soon as one has noticed.
    assert any(LOST in (run / "logs" / f"rank_000{rank}.log").read_text() for rank in (0, 1))
    stopped = assert_saved_where_it_stopped(run, process.text)

    process.wait_for(f"img {stopped + 4}/")
    back = time.monotonic() - begun
    with family_of(process):
        begun = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 75, process.text
        ended = time.monotonic() - begun
        assert ended < 30
    print(f"saved and gone after {gone:.1f} s, training again after {back:.1f} s, ended after {ended:.1f} s")
    assert assert_saved_where_it_stopped(run, process.text) >= stopped + 4


def ranks_of(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a run's processes that are ranks, and neither their launchers nor what they have forked."""
    found = [one for one in family if one.cmdline()[-1:] and SCRIPT in one.cmdline()[:4]]
    pids = {one.pid for one in found}
    return [one for one in found if one.ppid() not in pids]


def loads_torch(rank: psutil.Process) -> bool:
    return "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text()


def test_a_launcher_that_is_killed_while_its_ranks_load_is_missed(dclgan: Path, tmp_path: Path) -> None:
    """Its ranks would wait for it until the timeout of collectives."""
    run = tmp_path / "run"
    words = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), SCRIPT, "--config", str(dclgan)]
    process = launch([*words, "--run-dir", str(run), *ENDLESS], tmp_path / "console")
    # They have noted who has started them, and load torch.
    until(lambda: sum(map(loads_torch, ranks_of(psutil.Process(process.pid).children(recursive=True)))) == 2)
    assert not (run / ".lock").exists()
    with family_of(process):
        process.signal(signal.SIGKILL)
    assert "the launcher that started this rank is gone, before it could train" in process.text
    assert not (run / "checkpoints").exists()


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_killed_rank_changes_no_weight(dclgan: Path, tmp_path: Path, launcher: str) -> None:
    """The launcher ends the others, the supervisor starts all again, and they go on from the newest checkpoint."""
    length = settings(schedule__constant_epochs=12)
    counted = {"deepspeed": ["--num_gpus", "2"], "torchrun": ["--nproc_per_node", "2"]}[launcher]
    words = [launcher, *counted, "--master_port", str(free_port()), SCRIPT, "--config", str(dclgan), *length]
    supervised_run, whole = tmp_path / "run", tmp_path / "whole"
    command = [*SUPERVISE, "--restarts", "1", "--", *words, "--run-dir", str(supervised_run)]
    process = launch(command, tmp_path / "console")
    process.wait_for("Saved ")
    with family_of(process) as family:
        begun = time.monotonic()
        ranks_of(family)[1].kill()
        process.wait_for("restart 1 of 1")
        gone = time.monotonic() - begun
    assert process.wait() == 0, process.text
    assert "resumes at image" in process.text and gone <= 15
    print(f"{launcher}: a rank was killed, and all had ended after {gone:.1f} s")
    codes, texts = finish(start_ranks(2, ["--config", dclgan, *length, "--run", whole], tmp_path / "whole_log"))
    assert codes == [0, 0], texts
    assert checkpoints(supervised_run)[-1] == checkpoints(whole)[-1]
    for side in ("generator", "discriminator"):
        one, other = (
            run / "checkpoints" / checkpoints(whole)[-1] / f"{side}.safetensors" for run in (supervised_run, whole)
        )
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.soak
def test_of_two_supervisors_both_start_again_when_one_loses_its_launcher(dclgan: Path, tmp_path: Path) -> None:
    """As on two nodes, each with a supervisor and an agent of torchrun."""
    run, port = tmp_path / "run", str(free_port())
    ranks = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    train = [SCRIPT, "--config", str(dclgan), "--run-dir", str(run), *ENDLESS]
    nodes = [
        launch(
            [*SUPERVISE, "--restarts", "1", "--", *ranks, "--node_rank", str(node), *train],
            tmp_path / f"console_{node}",
        )
        for node in range(2)
    ]
    nodes[0].wait_for("img 8/")
    agent = psutil.Process(nodes[1].pid).children()[0]
    with family_of(nodes[0]), family_of(nodes[1]):
        agent.kill()
        for node in nodes:
            node.wait_for("restart 1 of 1")
    stopped = assert_saved_where_it_stopped(run, nodes[0].text)
    nodes[0].wait_for(f"img {stopped + 4}/")
    for node in nodes:
        node.signal(signal.SIGTERM)
    assert [node.wait() for node in nodes] == [75, 75], nodes[0].text
    assert assert_saved_where_it_stopped(run, nodes[0].text) >= stopped + 4


def test_ranks_of_torchrun_save_and_end_when_its_agent_is_killed(dclgan: Path, tmp_path: Path) -> None:
    """They have sessions of their own, so that nothing else reaches them."""
    run = tmp_path / "run"
    words = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), SCRIPT, "--config", str(dclgan)]
    process = launch([*words, "--run-dir", str(run), *ENDLESS], tmp_path / "console")
    process.wait_for("img 8/")
    with family_of(process):
        process.signal(signal.SIGKILL)
    assert LOST in process.text
    assert_saved_where_it_stopped(run, process.text)
