"""What a person can mend is answered with a sentence and an exit code, and leaves the run as it was."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from i2i_dist import checkpoint, command_line, config, run_directory, supervise
from i2i_dist.methods import resolve
from i2i_dist.train import main
from tests.ranks import rank_environment
from tests.train.runs import checkpoints, copy_run, finish, rows, settings, start, start_ranks

# --------------------------------------------------------------------------------- before anything starts: no process


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--set", "train.global_bach=8"], "train.global_bach: unknown key; did you mean 'global_batch'?"),
        (["--set", "method.name=dclgna"], "method.name: given 'dclgna', allowed is one of "),
        (["--set", "train.micro_batch=0"], "train.micro_batch: given 0, allowed is greater than 0"),
        (["--colour", "red"], "--colour is not an option here; see --help"),
        (["--dataroot", "my data/x"], "--dataroot is not an option here; write --set 'data.root=my data/x'"),
        (["--batch_size=4"], "--batch_size=4 is not an option here; write --set train.global_batch=4"),
        (["--lr", "--fresh"], "--lr is not an option here; write --set method.lr=VALUE"),
        (["--continue_train"], "--continue_train is not an option here; leave it out: a run goes on"),
        (["--config", "configs/dmo.yaml"], "there is no configuration configs/dmo.yaml; there are configs/"),
    ],
)
def test_command_line(words: list[str], answer: str, dclgan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(dclgan), *words]) == 2
    assert answer in capsys.readouterr().err


def test_a_dry_run_prints_what_loads_back(dclgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*settings(train__global_batch=6, method__lr=1e-5), "--deepspeed", "--deepspeed_config", "x.json"]
    assert main(["--config", str(dclgan), *words, "--local_rank=0", "--dry-run"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    loaded = config.load(printed)
    expected = config.load(dclgan, ["train.global_batch=6", "method.lr=1e-5"])
    assert loaded.model_dump(exclude={"method"}) == expected.model_dump(exclude={"method"})
    assert resolve(loaded.method)[1] == resolve(expected.method)[1]
    assert config.dump(loaded, resolve(loaded.method)[1]) == printed.read_text()


def test_half_an_environment_is_refused(
    dclgan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert main(["--config", str(dclgan)]) == 2
    assert "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not" in capsys.readouterr().err


@pytest.mark.parametrize("name", [supervise.RESTARTS, "SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"])
def test_no_restart_starts_over(
    name: str, dclgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(dclgan), "--fresh", "--run", str(tmp_path / "run")]
    monkeypatch.setenv(name, "1")
    assert main(words) == 2
    assert "--fresh: this command is started again when it fails, and would start over" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    monkeypatch.setenv(name, "0")
    assert command_line.parse(words).fresh


def test_a_restart_goes_back_once(tmp_path: Path) -> None:
    """Again where the try before ended too early to have done so, and once more for whoever asks once more."""
    old, first = str(tmp_path / "other" / "old"), ("images_000000000016", "images_000000000024")
    for name in first:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    asked_for = run_directory.asked_for
    assert asked_for(tmp_path, old, started_again=False) == old
    assert asked_for(tmp_path, old, started_again=True) == old  # what is there was trained before
    run_directory.note_going_back(tmp_path, old, 8)
    for name in first:
        (tmp_path / "checkpoints" / name).rmdir()  # they are set aside
    assert asked_for(tmp_path, old, started_again=True) == old
    (tmp_path / "checkpoints" / first[0]).mkdir()  # trained since
    assert [asked_for(tmp_path, old, started_again=True) for _ in range(2)] == ["auto"] * 2
    assert asked_for(tmp_path, f"{old}er", started_again=True) == f"{old}er"
    run_directory.note_going_back(tmp_path, old, 8)
    assert asked_for(tmp_path, old, started_again=False) == old
    assert asked_for(tmp_path, old, started_again=True) == old


def test_a_port_in_use_is_named(dclgan: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        environment = rank_environment(0, 2, taken.getsockname()[1])
        run = start(["--config", str(dclgan), "--run", str(tmp_path / "run")], tmp_path / "log", environment)
        assert run.wait() == 1, run.text  # worth another try
        assert f"port {environment['MASTER_PORT']}, on which the ranks meet, is in use" in run.text
        assert "Traceback" not in run.text


# ------------------------------------------------------------------------------------------------------- data and batch


def refused(words: list[str], log: Path, code: int = 2) -> str:
    run = start(words, log)
    assert run.wait() == code, run.text
    assert "Traceback" not in run.text
    return run.text


def test_missing_and_empty_folders_show_what_is_there(dclgan: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "trainA").mkdir(parents=True)
    (root / "horses").mkdir()
    words = ["--config", str(dclgan), *settings(data__root=str(root)), "--run", str(tmp_path / "run")]
    text = refused(words, tmp_path / "empty")
    assert f"train.py: The folder {root / 'trainA'} holds no images." in text
    assert f"Expected in {root}:" in text and "trainB/  images of domain B to train with" in text
    assert "Found:" in text and "  horses/  0 images" in text
    (root / "trainA").rmdir()
    assert f"The folder {root / 'trainA'} is not there." in refused(words, tmp_path / "missing")
    assert not (tmp_path / "run" / "stats.jsonl").exists()


def test_batches_that_do_not_divide(dclgan: Path, tmp_path: Path) -> None:
    words = ["--config", str(dclgan), "--run", str(tmp_path / "run")]
    codes, (text, other) = finish(start_ranks(2, [*words, *settings(train__global_batch=3)], tmp_path / "world"))
    assert codes == [2, 2]
    assert "given 3, allowed on 2 ranks is a multiple of 2; for example --set train.global_batch=4" in text
    assert other == ""  # the others know the same and need not repeat it
    text = refused([*words, *settings(train__global_batch=12, train__micro_batch=5)], tmp_path / "micro")
    assert "micro_batch: given 5, allowed is a divisor of global_batch / ranks = 12: 1, 2, 3, 4, 6, 12" in text
    split = settings(train__global_batch=4, train__micro_batch=2, method__negatives="global_batch")
    text = refused([*words, *split], tmp_path / "negatives")
    assert "train.micro_batch: given 2, but with this method's settings a sample's loss depends on the whole" in text


def test_critics_that_see_too_little_are_refused_before_there_is_memory_for_them(dclgan: Path, tmp_path: Path) -> None:
    """At full width these would have 2e12 parameters."""
    sizes = settings(data__root=config.load(dclgan).data.root, data__load_size=128, data__crop_size=96)
    deep = settings(method__global_layers=14, output__metrics_port=None)
    words = ["--config", "configs/ugatit_light_selfie2anime.yaml", *sizes, *deep, "--run", str(tmp_path / "run")]
    text = refused(words, tmp_path / "log")
    assert "data.crop_size: given 96, which does not fit: the discriminator was given images of 96 x 96" in text
    assert "they must be at least 12288 x 12288. Use larger images or fewer layers." in text


def test_a_directory_that_cannot_be_made(dclgan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["--config", str(dclgan), "--run", str(tmp_path / "file" / "run")]
    assert "cannot be written: Not a directory" in refused(words, tmp_path / "log")


# --------------------------------------------------------------------------------------------------- a run gone wrong


@pytest.fixture(scope="module")
def finished(dclgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three checkpoints; tests copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = ["--config", str(dclgan), "--run", str(run)]
    process = start(words, run.with_name("log"), hook="saves_take_three_updates")
    assert process.wait() == 0, process.text
    assert checkpoints(run) == [f"images_{images:012d}" for images in (8, 16, 24)]
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    yield copy_run(finished, tmp_path / "run")


def flip_a_bit(run: Path, name: str) -> None:
    path = run / "checkpoints" / name / "generator.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def longer(config: Path, run: Path, epochs: int = 4) -> list[str]:
    return ["--config", str(config), *settings(schedule__constant_epochs=epochs), "--run", str(run)]


def test_a_directory_in_use(dclgan: Path, run: Path, tmp_path: Path) -> None:
    before = (run / "config.yaml").read_text()
    with run_directory.lock(run):
        text = refused(longer(dclgan, run), tmp_path / "log", code=1)  # worth another try
    assert f"--run {run} is in use by process {os.getpid()} on " in text
    assert (run / "config.yaml").read_text() == before


def test_another_method_and_other_images_are_refused(dclgan: Path, data: Path, run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "logs" not in path.parts}
    text = refused([*longer(dclgan, run), *settings(method__head_dim=9)], tmp_path / "method")
    assert "cannot be continued with this configuration:\n  method.head_dim: " in text and " -> 9\n" in text
    other = copy_run(data, tmp_path / "other")
    (other / "trainB" / "00000.png").rename(other / "trainB" / "a.png")
    text = refused([*longer(dclgan, run), *settings(data__root=str(other))], tmp_path / "images")
    assert "data: the images of domain b are not those that the run was trained on" in text
    assert "of domain a are not" not in text
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "logs" not in path.parts}
    del before[run / ".lock"], after[run / ".lock"]
    assert after == before  # config.yaml and stats.jsonl above all


def test_broken_checkpoints(dclgan: Path, run: Path, tmp_path: Path) -> None:
    """The newest broken: the one before is taken. Then all broken: nothing starts over by itself."""
    flip_a_bit(run, checkpoints(run)[-1])
    process = start([*longer(dclgan, run), *settings(output__keep_checkpoints=1)], tmp_path / "newest")
    assert process.wait() == 0, process.text
    assert "Skipped checkpoint " in process.text and "its sha256 differs" in process.text
    assert "resumes at image 16" in process.text
    assert checkpoints(run) == [f"images_{32:012d}"]
    assert (run / "checkpoints" / "set_aside" / f"images_{24:012d}").is_dir()
    assert [row["images_seen"] for row in rows(run)] == list(range(2, 33, 2))

    flip_a_bit(run, checkpoints(run)[-1])
    text = refused(longer(dclgan, run, 5), tmp_path / "all", code=1)
    assert "none of the 1 checkpoints in" in text and "--fresh" in text
    assert [row["images_seen"] for row in rows(run)] == list(range(2, 33, 2))


def test_the_hint_of_the_newest_decides_nothing(dclgan: Path, run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "latest").write_text("")
    process = start(longer(dclgan, run), tmp_path / "log")
    assert process.wait() == 0, process.text
    assert "names ''; the newest checkpoint that verifies is images_000000000024" in process.text
    assert "resumes at image 24" in process.text
    assert (run / "checkpoints" / "latest").read_text() == f"images_{32:012d}\n"


def test_going_back_to_an_older_checkpoint(dclgan: Path, run: Path, tmp_path: Path) -> None:
    missing = str(run / "checkpoints" / "images_9")
    text = refused([*longer(dclgan, run), "--resume", missing], tmp_path / "missing")
    assert f"--resume {missing}: not a checkpoint; this run's are: " in text
    assert all(name in text for name in checkpoints(run))

    flip_a_bit(run, f"images_{16:012d}")
    path = str(run / "checkpoints" / f"images_{16:012d}")
    assert f"--resume {path}: generator" in refused([*longer(dclgan, run), "--resume", path], tmp_path / "bad", code=1)

    words = [*longer(dclgan, run), "--resume", str(run / "checkpoints" / f"images_{8:012d}")]
    words += settings(output__keep_checkpoints=2)
    process = start(words, tmp_path / "log", hook="saves_take_three_updates")
    assert process.wait() == 0, process.text
    assert "resumes at image 8" in process.text
    assert checkpoints(run) == [f"images_{images:012d}" for images in (24, 32)]
    left = sorted(path.name for path in (run / "checkpoints" / "set_aside").iterdir())
    assert left == [f"images_{images:012d}" for images in (16, 24)]
    for name in checkpoints(run):
        checkpoint.verify(run / "checkpoints" / name)
    assert [row["images_seen"] for row in rows(run)] == list(range(2, 33, 2))

    process = start(words, tmp_path / "again", {supervise.RESTART: "1"})  # a restart has nothing left to do
    assert process.wait() == 0, process.text
    assert "The run has gone on since it went back with --resume" in process.text
    assert "Done: 32 images seen" in process.text and "Saved" not in process.text
    assert checkpoints(run) == [f"images_{images:012d}" for images in (24, 32)]


def test_starting_over_beside_a_run(dclgan: Path, run: Path, tmp_path: Path) -> None:
    before = (run / "stats.jsonl").read_bytes()
    words = ["--config", str(dclgan), "--run", str(run), "--fresh", *settings(method__lambda_nce=3.0)]
    process = start([*words, *settings(schedule__constant_epochs=1)], tmp_path / "log")
    assert process.wait() == 0, process.text
    assert f"Done: 8 images seen. Run directory: {run}-2" in process.text
    assert checkpoints(run.with_name("run-2")) == [f"images_{8:012d}"]
    assert (run / "stats.jsonl").read_bytes() == before and len(checkpoints(run)) == 3


def test_a_finished_run_has_nothing_to_do(dclgan: Path, run: Path, tmp_path: Path) -> None:
    gone = {supervise.VARIABLE: f"{os.getpid()}:gone"}  # a supervisor above it that it cannot report to
    process = start(["--config", str(dclgan), "--run", str(run)], tmp_path / "log", gone)
    assert process.wait() == 0, process.text
    assert "Done: 24 images seen" in process.text and "Saved" not in process.text
    log = (run / "logs" / "rank_0000.log").read_text()
    assert "The supervisor above this rank cannot be told of it: it will hand no signal on to this rank." in log


def test_what_is_no_architecture_may_change_on_a_resume(dclgan: Path, run: Path, tmp_path: Path) -> None:
    (ended,) = start_ranks(1, [*longer(dclgan, run), *settings(method__lr=1e-5)], tmp_path / "log")
    assert finish([ended])[0] == [0]
    assert "Changed since the checkpoint: method.lr: 0.0002 -> 1e-05." in ended.text
    assert "resumes at image" in ended.text


def test_a_run_directory_that_is_not_shared_is_refused(dclgan: Path, tmp_path: Path) -> None:
    hooks = ("", "another_run_directory")
    words = ["--config", dclgan, "--run", tmp_path / "run"]
    codes, (text, _) = finish(start_ranks(2, words, tmp_path / "log", hooks=hooks))
    assert codes == [2, 2]
    assert "rank 1 does not see what rank 0 has written there; the run's directory must be on a file system" in text
