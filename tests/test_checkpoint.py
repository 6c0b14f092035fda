"""Checkpoints survive damage, full disks and sudden death: what is believed is whole, and what was good stays."""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from i2i_dist import __version__, canonical, checkpoint, saver
from i2i_dist.checkpoint import CheckpointError, State, directory_name, newest_verified, verify
from i2i_dist.engines import Layout
from i2i_dist.method import SIDES
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep
from tests import needs
from tests.ranks import ROOT, run_ranks

CONFIG = {"method": {"name": "any", "lr": 2e-4}, "data": {"root": "somewhere"}}
FILES = [
    "discriminator.safetensors", "generator.safetensors", "manifest.json", "pool_rank_0000.safetensors", "state.json",
]  # fmt: skip


FILES_OF_THE_PROJECT = [*Path(checkpoint.__file__).parent.rglob("*.py"), *(ROOT / "launchers").glob("*.py")]


def torch_bytes(value: Any) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def pickle_0(value: Any) -> bytes:
    return pickle.dumps(value, protocol=0)


class NoAverage:
    """An `Ema` that is switched off; averages over ranks are tested beside this file."""

    averages: dict[str, Tensor] = {}  # noqa: RUF012

    def restore(self, source: Any) -> None:
        pass


def plain_sides(seed: int, steps: int = 2, width: int = 3, device: str = "cpu") -> Any:
    """Two sides as an engine at ZeRO stage 0 on one rank holds them, without an engine; with persistent buffers."""
    torch.manual_seed(seed)
    sides = {}
    for side in SIDES:
        module = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1)).to(device)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.randn(2, 3, 6, 6).to(device)).square().mean().backward()
            optimizer.step()
        engine = SimpleNamespace(optimizer=None)
        sides[side] = SimpleNamespace(module=module, optimizer=optimizer, engine=engine, layout=Layout(1, 1, 1))
    return sides


trained = functools.cache(plain_sides)  # for those who only look


def filled_pools(seed: int, device: str = "cpu") -> ImagePools:
    pools = ImagePools(("fake_a", "fake_b"), 2, seed=0)
    torch.manual_seed(seed)
    pools.images = {field: list(torch.randn(2, 3, 4, 4).to(device)) for field in pools.images}
    return pools


def everything(sides: Any, pools: ImagePools) -> dict[str, Tensor]:
    """Return, copied, all that a checkpoint has to bring back, read from where training has it."""
    found = {f"pool/{field}/{i}": image for field, images in pools.images.items() for i, image in enumerate(images)}
    for name, side in sides.items():
        found |= {f"{name}/{key}": value for key, value in side.module.state_dict().items()}
        for key, parameter in side.module.named_parameters():
            found |= {f"{name}/{key}/{kind}": value for kind, value in side.optimizer.state[parameter].items()}
    return {key: value.detach().clone() for key, value in found.items()}


def save(directory: Path, images_seen: int, keep: int = 3, seed: int | None = None, **more: Any) -> str | None:
    """Save a state that follows from `images_seen`, unless it shall be that of another seed."""
    seed = images_seen if seed is None else seed
    state = State(images_seen, images_seen // 2, 1, CONFIG, {"a": "1", "b": "2"}, more.pop("scores", {}))
    captured = saver.capture(trained(seed), NoAverage())  # type: ignore[arg-type]
    failure = saver.write(directory, state, captured, filled_pools(seed), Keep(keep, **more))
    return failure.reason if failure else None


def restored(path: Path) -> dict[str, Tensor]:
    sides, pools = plain_sides(999, steps=1), filled_pools(999)
    checkpoint.restore(path, sides, NoAverage(), pools, torch.device("cpu"))  # type: ignore[arg-type]
    return everything(sides, pools)


def expected(seed: int) -> dict[str, Tensor]:
    return everything(trained(seed), filled_pools(seed))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def visible(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("images_")) for path in directory.glob("images_*"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here, and threads waiting for their share of nothing take the time of other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one, for what saves hundreds of times: a disk's flushes take their time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def good(memory_path: Path) -> Path:
    """A checkpoint at 100 images seen."""
    assert save(memory_path, 100) is None
    return memory_path / directory_name(100)


# ------------------------------------------------------------------------------------------------------ what is written


def test_what_was_saved_comes_back(good: Path) -> None:
    assert not same(expected(100), expected(999)), "the comparison below would say nothing"
    assert same(restored(good), expected(100))
    state = checkpoint.read_state(good)
    assert state == State(100, 50, 1, CONFIG, {"a": "1", "b": "2"}, {})
    assert (good.parent / "latest").read_text().strip() == good.name
    assert sorted(path.name for path in good.iterdir()) == FILES


def test_sides_are_plain_safetensors_in_full_shapes(good: Path) -> None:
    sides = trained(100)
    for name in SIDES:
        module, stored = sides[name].module, load_file(good / f"{name}.safetensors")
        for key, parameter in module.named_parameters():
            moments = sides[name].optimizer.state[parameter]
            assert torch.equal(stored.pop(f"param/{key}"), parameter)
            assert torch.equal(stored.pop(f"exp_avg/{key}"), moments["exp_avg"])
            assert torch.equal(stored.pop(f"exp_avg_sq/{key}"), moments["exp_avg_sq"])
        for key, buffer in module.named_buffers():
            loaded = stored.pop(f"buffer/{key}")
            assert torch.equal(loaded, buffer)
            assert loaded.dtype == buffer.dtype
        assert not stored


def test_nothing_is_pickled(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    verify(good)
    restored(good)
    for path in good.iterdir():
        start = path.read_bytes()[:10]
        assert start[:1] == b"{" if path.suffix == ".json" else start[8:9] == b"{", path


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: written(descriptor, data[:7], at))
    assert save(tmp_path, 100) is None
    assert same(restored(tmp_path / directory_name(100)), expected(100))


def test_everything_is_flushed_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def watched_rename(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    assert save(tmp_path / "checkpoints", 100) is None
    published = events.index(("rename", directory_name(100)))
    flushed = [name for event, name in events[:published] if event == "fsync"]
    assert set(FILES) <= set(flushed)
    assert any(name.startswith(".writing-") for name in flushed), "the directory of the files"
    assert flushed.index("manifest.json") > max(flushed.index(name) for name in FILES if name != "manifest.json")
    assert ("fsync", "checkpoints") in events[published:], "the directory that holds the name"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for images_seen in (10, 20, 30, 40):
        assert save(tmp_path, images_seen, keep=2) is None
    assert visible(tmp_path) == [30, 40]
    assert save(tmp_path, 50, keep=1) is None
    assert visible(tmp_path) == [50]
    assert hidden(tmp_path) == []


def test_pruning_spares_what_was_just_written(tmp_path: Path) -> None:
    """Newer ones may be there: they did not verify, or training was told to go on from an older one."""
    for images_seen in (10, 20, 30):
        assert save(tmp_path, images_seen) is None
    (tmp_path / directory_name(30) / "state.json").unlink()
    assert save(tmp_path, 15, keep=1) is None
    found, _ = newest_verified(tmp_path)
    assert found is not None
    assert 15 in visible(tmp_path)
    assert same(restored(tmp_path / directory_name(15)), expected(15))


def test_pruning_touches_nothing_else(tmp_path: Path) -> None:
    """People keep a checkpoint by copying it; the copy is theirs."""
    assert save(tmp_path, 10) is None
    shutil.copytree(tmp_path / directory_name(10), tmp_path / f"{directory_name(10)}_best")
    for images_seen in (20, 30):
        assert save(tmp_path, images_seen, keep=1) is None
    assert sorted(path.name for path in tmp_path.glob("images_*")) == [f"{directory_name(10)}_best", directory_name(30)]
    assert newest_verified(tmp_path) == (tmp_path / directory_name(30), [])


def test_one_that_did_not_verify_is_replaced(good: Path) -> None:
    (good / "generator.safetensors").write_bytes(b"")
    (good / "rubbish").write_bytes(b"rubbish")
    assert save(good.parent, 100, seed=7) is None
    verify(good)
    assert same(restored(good), expected(7))
    assert sorted(path.name for path in good.iterdir()) == FILES
    assert hidden(good.parent) == []


# --------------------------------------------------------------------------------------------------------------- damage


def manifest_of(state: Any) -> str:
    """A manifest that says `state` of the file state.json."""
    sides = {f"{side}.safetensors": {"bytes": 0, "sha256": ""} for side in SIDES}
    return json.dumps({"format": 1, "files": {"state.json": state} | sides})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(path)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["nothing", "half", "all but a byte", "a byte more"])
def test_another_length_is_noticed(good: Path, name: str, left: str) -> None:
    whole = (good / name).read_bytes()
    kept = {"nothing": b"", "half": whole[: len(whole) // 2], "all but a byte": whole[:-1]}.get(left, whole + b"x")
    (good / name).write_bytes(kept)
    assert name in refusal(good)


def test_every_flipped_bit_is_noticed(good: Path) -> None:
    chance = random.Random(1)
    for name in FILES:
        whole = (good / name).read_bytes()
        # The manifest is what all else is checked against and nothing checks it, so there every byte is damaged.
        bits = [8 * byte + chance.randrange(8) for byte in range(len(whole))]
        for bit in bits if name == "manifest.json" else chance.sample(bits, 60):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (good / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify(good)
        (good / name).write_bytes(whole)
    verify(good)


def test_a_flipped_bit_that_makes_two_names_one_is_noticed(good: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    (good / "pool_rank_0001.safetensors").write_bytes((good / "pool_rank_0000.safetensors").read_bytes())
    manifest["files"]["pool_rank_0001.safetensors"] = manifest["files"]["pool_rank_0000.safetensors"]
    text = json.dumps(manifest)
    (good / "manifest.json").write_text(text)
    verify(good)
    (good / "manifest.json").write_text(text.replace("rank_0000", "rank_0001"))
    assert "twice" in refusal(good)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_missing_file_is_named(good: Path, name: str) -> None:
    (good / name).unlink()
    assert refusal(good) == f"{name} is missing"


def test_a_missing_manifest_is_named(good: Path) -> None:
    (good / "manifest.json").unlink()
    assert refusal(good) == "manifest.json is missing"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "manifest.json cannot be read"),
        ("{", "manifest.json cannot be read"),
        ("\x80", "manifest.json cannot be read"),
        ("[" * 100_000, "manifest.json cannot be read"),
        ("[]", "manifest.json does not hold"),
        ("{}", "its format is None, written by version "),
        ('{"format": true, "files": {}}', "its format is True, written by version "),
        ('{"format": 0, "files": {}}', "its format is 0, written by version "),
        ('{"format": "2", "files": {}}', "its format is '2', written by version "),
        ('{"format": 1}', "does not list"),
        ('{"format": 1, "files": []}', "does not list"),
        ('{"format": 1, "files": {}}', "does not list"),
        ('{"format": 1, "files": {"state.json": 3}}', "does not list its files: state.json, generator.safetensors, "),
        (manifest_of(3), "does not list the size and sha256 of state.json"),
        (manifest_of({"bytes": 3}), "does not list the size and sha256 of state.json"),
    ],
)
def test_a_manifest_that_is_none_is_refused(good: Path, text: str, reason: str) -> None:
    (good / "manifest.json").write_bytes(text.encode("latin-1"))
    assert reason in refusal(good)


# ------------------------------------------------------------------------------------------------------ other formats


def seal(path: Path, number: int = checkpoint.FORMAT) -> None:
    """Write a manifest by hand, with the right size and sum of all that lies there now."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"format": number, "files": files}))


def test_a_checkpoint_of_format_1_is_read(good: Path) -> None:
    """As version 1 wrote it: state.json without scores, and without the program's version."""
    document = json.loads((good / "state.json").read_text())
    old = {key: document[key] for key in ("images_seen", "updates", "world", "config", "dataset", "optimizer")}
    assert document.keys() - old.keys() == {"scores", "written_by"}
    (good / "state.json").write_text(json.dumps(old, indent=1))
    seal(good, 1)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    assert checkpoint.find(good.parent) == good
    assert checkpoint.read_state(good) == State(100, 50, 1, CONFIG, {"a": "1", "b": "2"}, {})
    assert same(restored(good), expected(100))
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    assert save(good.parent, 200, keep=1, best="loss") is None, "beside it, with a measure that it does not have"
    assert visible(good.parent) == [200]


def test_every_format_before_this_one_has_its_migration() -> None:
    assert list(checkpoint._MIGRATIONS) == list(range(1, checkpoint.FORMAT))


def test_a_checkpoint_of_a_later_format_says_who_wrote_it(good: Path) -> None:
    document = json.loads((good / "state.json").read_text()) | {"written_by": "7.5.1", "unheard": "of"}
    (good / "state.json").write_text(json.dumps(document))
    seal(good, 3)
    assert refusal(good) == (
        f"its format is 3, written by version 7.5.1, and this version, {__version__}, reads formats 1 to 2; go on with "
        "the version that wrote it or a newer one, or from an older checkpoint"
    )


@pytest.mark.parametrize("key", ["images_seen", "config", "scores", "optimizer"])
def test_a_state_that_lacks_something_is_refused(good: Path, key: str) -> None:
    document = json.loads((good / "state.json").read_text())
    del document[key]
    (good / "state.json").write_text(json.dumps(document))
    seal(good)
    assert refusal(good) == f"state.json does not say {key}"


# -------------------------------------------------------------------------------------------------------------- pickles


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.file,)


PICKLES: dict[str, Callable[[Any], bytes]] = {"pickle": pickle.dumps, "torch": torch_bytes, "protocol 0": pickle_0}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generator.safetensors", "generator.safetensors is no safetensors file, and is not read: "),
        ("pool_rank_0000.safetensors", "pool_rank_0000.safetensors is no safetensors file, and is not read: "),
        ("state.json", "state.json cannot be read: "),
        ("extra.pkl", "manifest.json lists 'extra.pkl', which is no file of a checkpoint"),
        ("pool_rank_0001.safetensors", "pool_rank_0001.safetensors is no safetensors file, and is not read: "),
    ],
)
def test_a_pickle_under_a_good_manifest_is_never_read(
    good: Path, tmp_path: Path, kind: str, name: str, words: str
) -> None:
    content = PICKLES[kind](Canary(tmp_path / "canary"))
    (good / name).write_bytes(content)
    seal(good)
    assert refusal(good).startswith(words)
    found, skipped = newest_verified(good.parent)
    assert found is None and skipped[0].reason.startswith(words)
    with pytest.raises(CheckpointError, match=r"is no checkpoint and no run directory with one that verifies"):
        checkpoint.find(good.parent)
    for read in (checkpoint.read_state, lambda path: checkpoint.side_file(path, "generator"), restored):
        with contextlib.suppress(Exception):  # nobody reads what does not verify; but if
            read(good)
    assert not (tmp_path / "canary").exists()
    assert save(good.parent, 50) is None
    assert newest_verified(good.parent)[0] == good.with_name(directory_name(50)), "an older one takes its place"
    torch.load(io.BytesIO(content), weights_only=False) if kind == "torch" else pickle.loads(content)
    assert (tmp_path / "canary").exists(), "the canary would have sung"


def test_a_manifest_leads_nowhere_else(good: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    for name in ("../elsewhere.safetensors", "/etc/hostname", "state.json/../state.json", "generator.safetensors\n"):
        (good / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | {name: {}}}))
        assert "is no file of a checkpoint" in refusal(good)


def test_nothing_here_can_read_a_pickle() -> None:
    """By the syntax trees: `torch.load` only with `weights_only=True`, and of `pickle` only the name of an error."""
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"}
    loads = 0
    for file in FILES_OF_THE_PROJECT:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "marshal", "shelve", "dill", "joblib"), file
            if not isinstance(node, ast.Call):
                continue
            called, named = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in forbidden, f"{file}: {called}"
            if called == "torch.load":
                loads += 1
                assert named.get("weights_only") == "True", f"{file}: torch.load without weights_only=True"
            if called in ("np.load", "numpy.load"):
                assert named.get("allow_pickle", "False") == "False", file
    assert loads == 1, "the official code's files"


# ----------------------------------------------------------------------------------------------------------- the newest


def test_a_file_that_cannot_be_read_is_passed_over(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(good.parent, 200) is None

    def broken(path: Path) -> str:
        if "200" in path.parent.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    digest = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", broken)
    found, skipped = newest_verified(good.parent)
    assert found == good
    assert "Input/output error" in skipped[0].reason


def test_the_newest_that_verifies_is_found_and_others_are_named(tmp_path: Path) -> None:
    for images_seen in (10, 20, 30, 40):
        assert save(tmp_path, images_seen, keep=9) is None
    assert newest_verified(tmp_path) == (tmp_path / directory_name(40), [])
    (tmp_path / directory_name(40) / "manifest.json").unlink()
    (tmp_path / directory_name(30) / "generator.safetensors").write_bytes(b"")
    found, skipped = newest_verified(tmp_path)
    assert found == tmp_path / directory_name(20)
    assert [path.name for path, _ in skipped] == [directory_name(40), directory_name(30)]
    assert skipped[0].reason == "manifest.json is missing"
    assert skipped[1].reason.startswith("generator.safetensors has 0 bytes, and had ")
    for images_seen in (10, 20):
        (tmp_path / directory_name(images_seen) / "state.json").unlink()
    found, skipped = newest_verified(tmp_path)
    assert found is None
    assert len(skipped) == 4


@pytest.mark.parametrize("text", [None, "", "images_000000000999\n", "\0", "../../elsewhere"])
def test_what_latest_says_decides_nothing(good: Path, text: str | None) -> None:
    latest = good.parent / "latest"
    latest.unlink()
    if text is not None:
        latest.write_text(text)
    assert newest_verified(good.parent) == (good, [])
    assert save(good.parent, 200) is None
    assert latest.read_text().strip() == directory_name(200)


@pytest.mark.parametrize("entry", ["a file", "nothing"])
def test_a_directory_without_checkpoints_has_none(tmp_path: Path, entry: str) -> None:
    if entry == "a file":
        (tmp_path / directory_name(5)).write_text("not a directory")
    assert newest_verified(tmp_path / "checkpoints") == (None, [])
    assert newest_verified(tmp_path) == (None, [])


def test_another_architecture_is_refused_by_name(good: Path) -> None:
    wider = plain_sides(1, width=4)
    with pytest.raises(ValueError, match=r"0\.weight.*in all"):
        checkpoint.restore(good, wider, NoAverage(), filled_pools(1), torch.device("cpu"))  # type: ignore[arg-type]


def test_a_missing_buffer_is_refused_by_name(good: Path) -> None:
    sides = plain_sides(1)
    sides["generator"].module.register_buffer("late", torch.zeros(3))
    with pytest.raises(ValueError, match="buffer/late"):
        checkpoint.restore(good, sides, NoAverage(), filled_pools(1), torch.device("cpu"))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- full disks

CALLS: list[tuple[Any, str]] = [
    (os, "pwrite"), (os, "fsync"), (os, "rename"), (os, "replace"), (pathlib.Path, "open"), (pathlib.Path, "mkdir"),
]  # fmt: skip


class Interrupted:
    """Counts the calls that change a disk, and does `what` instead of call number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, what: Callable[[], None]) -> None:
        self.calls, self.at, self.what = 0, at, what
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.at:
                self.what()
            return function(*args, **kwargs)

        return call


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_calls(directory: Path, images_seen: int) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Interrupted(monkeypatch, -1, disk_full)
        assert save(directory, images_seen, keep=1) is None
    return counted.calls


@pytest.mark.parametrize("over", ["an older one", "one of the same name"])
def test_a_disk_full_at_any_moment_costs_nothing(memory_path: Path, over: str) -> None:
    """Every call that can fail does so once; `keep` is 1, so that the last good one is always at stake."""
    old, new = (100, 200) if over == "an older one" else (100, 100)
    moments = disk_calls(memory_path / "counted", 100)
    assert moments > 20
    refused = 0
    for moment in range(moments + 5):
        directory = memory_path / str(moment)
        assert save(directory, old, keep=1, seed=1) is None
        with pytest.MonkeyPatch.context() as monkeypatch:
            Interrupted(monkeypatch, moment, disk_full)
            reason = save(directory, new, keep=1, seed=2)
        found, skipped = newest_verified(directory)
        assert found is not None
        assert not skipped
        assert hidden(directory) == [], f"at call {moment} something was left behind"
        if reason is None:
            assert same(restored(found), expected(2))
        else:
            assert reason == "rank 0: No space left on device"
            refused += 1
        if found.name == directory_name(old) and old != new:
            assert same(restored(found), expected(1))
        assert save(directory, 300, keep=1) is None, "and then there is room again"
        assert visible(directory) == [300]
        assert (directory / "latest").read_text().strip() == directory_name(300)
        shutil.rmtree(directory)
    assert refused > moments - 10


def test_a_file_size_limit_is_reported(good: Path) -> None:
    """The kernel's own refusal, in place of a disk that is too small."""
    size = max(path.stat().st_size for path in good.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 100, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            reason = save(good.parent, 200)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert reason == "rank 0: File too large"
            assert newest_verified(good.parent) == (good, [])
            assert hidden(good.parent) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert save(good.parent, 200) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
        problem = mounted.stderr.strip() if mounted.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        needs.skip(f"a small disk cannot be mounted here: {problem}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    assert save(directory, 100) is None
    ballast = small_disk / "ballast"
    while True:
        try:
            with ballast.open("ab") as file:
                file.write(bytes(4096))
        except OSError:
            break
    assert save(directory, 200) == "rank 0: No space left on device"
    assert newest_verified(directory) == (directory / directory_name(100), [])
    assert hidden(directory) == []
    ballast.unlink()
    assert save(directory, 200) is None


# --------------------------------------------------------------------------------------------------------- sudden death


def _kill_and_look(directory: Path, child: Callable[[], None], delay: float | None) -> tuple[bool, bool]:
    """Run `child` in a process of its own, kill it after `delay` or when it kills itself, and look at what is left.

    Returns:
        Whether death came in the middle of a save, and whether it came by the signal.
    """
    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    in_the_middle = bool(hidden(directory))
    found, skipped = newest_verified(directory)
    assert found is not None, f"no checkpoint is left in {os.listdir(directory)}"
    assert not skipped, skipped
    images_seen = checkpoint.read_state(found).images_seen
    assert same(restored(found), expected(images_seen % 2))
    return in_the_middle, os.WIFSIGNALED(status)


def deaths(root: str) -> dict[str, int]:
    """Kill savers, in a process that has one thread and can be forked: first by the clock, then at every disk call."""
    chance, counts = random.Random(2), {"in the middle": 0, "moments": 0, "killed": 0}
    by_clock = Path(root) / "clock"
    assert save(by_clock, 1, keep=1, seed=1) is None
    started = time.monotonic()
    for images_seen in range(2, 6):
        assert save(by_clock, images_seen, keep=1, seed=images_seen % 2) is None
    one_save = (time.monotonic() - started) / 4

    def savers() -> None:
        first = visible(by_clock)[-1] + 1
        for images_seen in range(first, first + 1000):
            save(by_clock, images_seen, keep=1, seed=images_seen % 2)

    for _ in range(40):
        in_the_middle, _ = _kill_and_look(by_clock, savers, chance.uniform(0, 3 * one_save))
        counts["in the middle"] += in_the_middle
    moments = disk_calls(Path(root) / "counted", 100)
    for moment in range(moments):
        directory = Path(root) / f"moment_{moment}"
        assert save(directory, 100, keep=1, seed=0) is None

        def saver(directory: Path = directory, moment: int = moment) -> None:
            Interrupted(pytest.MonkeyPatch(), moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(directory, 201, keep=1, seed=1)

        _, killed = _kill_and_look(directory, saver, None)
        counts["killed"] += killed
        assert save(directory, 300, keep=1) is None
        assert hidden(directory) == [], "the next save clears away what the dead one left"
    return counts | {"moments": moments}


def test_a_killed_saver_leaves_a_good_checkpoint(tmp_path: Path, memory_path: Path) -> None:
    (counts,) = run_ranks(1, "tests.test_checkpoint:deaths", tmp_path, str(memory_path))
    assert counts["in the middle"] >= 5, "deaths have to come while something is being written"
    assert counts["killed"] == counts["moments"] > 20


# --------------------------------------------------------------------------------------------------------- small things


def test_differences_name_keys_and_both_values() -> None:
    old = {"method": {"name": "dclgan", "lr": 1e-4, "gone": 1}, "data": {"root": "x"}}
    new = {"method": {"name": "dclgan", "lr": 2e-4, "new": 2}, "data": {"root": "y"}}
    assert checkpoint.differences(old, new, ["method"]) == [
        "method.lr: 0.0001 -> 0.0002",
        "method.gone: 1 -> None",
        "method.new: None -> 2",
    ]
    assert checkpoint.differences(old, old, ["method", "data"]) == []


def test_names_sort_as_the_numbers_do() -> None:
    numbers = [5, 10, 900, 12_800, 10**11]
    assert sorted(map(directory_name, numbers)) == [directory_name(number) for number in numbers]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_runs_of_any_dtype_are_read_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = (torch.arange(30) % 7).to(dtype).view(5, 6)
    tensors = {
        "x": ((3,), torch.uint8),
        "y": ((5, 6), dtype),
        "z": ((), torch.float32),
        "none": ((0, 4), torch.float32),
    }
    pieces = {
        "x": canonical.Piece(0, torch.tensor([1, 2, 3], dtype=torch.uint8)),
        "y": canonical.Piece(0, whole.flatten()),
        "z": canonical.Piece(0, torch.tensor([2.5])),
    }
    canonical.create(tmp_path / "file", tensors)
    canonical.write_pieces(tmp_path / "file", tensors, pieces)
    source = canonical.CanonicalFile(tmp_path / "file", {})
    assert torch.equal(source.read("y", 7, 11), whole.flatten()[7:18])
    assert torch.equal(source.whole("y"), whole)
    assert source.whole("z").item() == 2.5
    assert source.shapes() == {key: shape for key, (shape, _) in tensors.items()}
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["y"], whole)
    assert loaded["none"].shape == (0, 4)
