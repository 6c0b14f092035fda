"""Shards of any origin are indexed, and damage is found, named and survived."""

from __future__ import annotations

import io
import logging
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from i2i_dist.data import index
from i2i_dist.data.batch import BadData
from i2i_dist.data.folders import open_source
from i2i_dist.data.index import Keys, load_index
from i2i_dist.data.tar import scan_shard
from tests.data.builders import encoded, noise, reader_of, write_folder, write_tar


def images(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{first + i:04d}.png", encoded(noise(first + i, 16, 16))) for i in range(count)]


def contents(root: Path, name: str = "trainA") -> list[tuple[str, bytes]]:
    source = open_source(root, name)
    return [source.read(i) for i in range(sum(source.counts))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_third_party_shards_in_every_tar_format(tmp_path: Path, form: int) -> None:
    deep = "/".join(["folder" * 4] * 4) + "/"  # 100 characters, which ustar splits and the others extend
    names = [f"{deep}{i}.v1" for i in range(3)] + [
        f"{'é' * (90 if form != tarfile.USTAR_FORMAT else 20)}{i}" for i in range(2)
    ]
    members: list[tuple[str, bytes]] = []
    for number, name in enumerate(names):
        members += [(f"{name}.json", b"{}"), (f"{name}.PNG", encoded(noise(number))), (f"{name}.txt", b"caption")]
    write_tar(tmp_path / "trainA" / "x.tar", members, form)
    found = contents(tmp_path)
    assert [key for key, _ in found] == [name.removesuffix(".v1") for name in names]
    assert [data for _, data in found] == [data for name, data in members if name.endswith("PNG")]
    theirs = list(webdataset.WebDataset(str(tmp_path / "trainA" / "x.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [key for key, _ in found]


def test_shards_written_by_webdataset(tmp_path: Path) -> None:
    (tmp_path / "trainA").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "trainA" / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write({"__key__": f"k{number}", "png": noise(number), "cls": number})
    assert list(open_source(tmp_path, "trainA").counts) == [3, 3, 1]
    assert [key for key, _ in contents(tmp_path)] == [f"k{i}" for i in range(7)]


def test_directories_and_global_headers_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "trainA").mkdir()
    with tarfile.open(tmp_path / "trainA" / "x.tar", "w", pax_headers={"comment": "all"}) as tar:
        for name, kind in (
            ("v1.0", tarfile.DIRTYPE),
            ("v1.0/a.png", tarfile.REGTYPE),
            ("v1.0/.b.png", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info, io.BytesIO())
    assert list(open_source(tmp_path, "trainA").keys) == ["v1.0/a"]


def test_keys_repeated_in_other_shards_are_told_apart(tmp_path: Path) -> None:
    for shard in "xy":
        write_tar(tmp_path / "trainA" / f"{shard}.tar", images(2))
    assert list(open_source(tmp_path, "trainA").keys) == ["x/0000", "x/0001", "y/0000", "y/0001"]


def test_second_opening_uses_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "trainA" / "x.tar", images(4))
    first = open_source(tmp_path, "trainA")
    monkeypatch.setattr(index, "scan_shard", lambda _: pytest.fail("scanned again"))
    second = open_source(tmp_path, "trainA")
    assert (second.fingerprint, list(second.keys)) == (first.fingerprint, list(first.keys))
    assert [second.read(i) for i in range(4)] == [first.read(i) for i in range(4)]


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    write_tar(tmp_path / "one" / "x.tar", images(4))
    write_tar(tmp_path / "changed" / "x.tar", [*images(3), ("0003.png", encoded(noise(9, 16, 16)))])
    write_tar(tmp_path / "divided" / "x.tar", images(2))
    write_tar(tmp_path / "divided" / "y.tar", images(2, first=2))
    write_tar(tmp_path / "same" / "z.tar", images(4), tarfile.GNU_FORMAT)
    one, changed, divided, same = (
        open_source(tmp_path, name).fingerprint for name in ("one", "changed", "divided", "same")
    )
    assert one == same and len({one, changed, divided}) == 3


def test_cut_shard_without_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "trainA" / "x.tar"
    write_tar(shard, images(10))
    whole = contents(tmp_path)
    (tmp_path / "trainA" / "index.npz").unlink()
    cut = scan_shard(shard).samples[6].offset + 100
    with shard.open("r+b") as file:
        file.truncate(cut)
    for _ in range(2):  # also when the stored index knows of it already
        caplog.clear()
        assert contents(tmp_path) == whole[:6]
        [record] = caplog.records
        assert record.levelno == logging.WARNING and record.name == "i2i_dist.data"
        assert f"{shard} is damaged: it ends at byte {cut}, inside '0006.png'" in record.getMessage()
        assert "The 6 samples before that are used" in record.getMessage()


def test_cut_shard_with_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "trainA" / "x.tar"
    write_tar(shard, images(10))
    write_folder(tmp_path / "trainB", 3)
    fingerprint = open_source(tmp_path, "trainA").fingerprint
    size, cut = shard.stat().st_size, scan_shard(shard).samples[6].offset + 100
    with shard.open("r+b") as file:
        file.truncate(cut)
    source = open_source(tmp_path, "trainA")
    assert source.fingerprint == fingerprint and sum(source.counts) == 10
    [message] = [record.getMessage() for record in caplog.records]
    assert f"{shard} has {cut} bytes, but {size} when it was indexed: 4 of its 10 samples lie beyond" in message
    with pytest.raises(BadData, match=r"x.tar is cut: 100 of \d+ bytes at byte"):
        source.read(6)
    batch = reader_of(tmp_path).read(range(10), 0)
    assert {bad.key for bad in batch.bad} == {"0006", "0007", "0008", "0009"}
    assert batch.images["a"].shape == (10, 8, 8, 3)


def test_flipped_bit_in_an_image_is_found(tmp_path: Path) -> None:
    shard = tmp_path / "trainA" / "x.tar"
    write_tar(shard, images(3))
    source = open_source(tmp_path, "trainA")
    content = bytearray(shard.read_bytes())
    content[scan_shard(shard).samples[1].offset + 200] ^= 4
    shard.write_bytes(content)
    assert source.read(0)[0] == "0000"
    with pytest.raises(BadData, match="checksum differs"):
        source.read(1)


@pytest.mark.parametrize(
    ("damage", "kept", "clause"),
    [
        (
            lambda data, header: data[:header] + bytes([data[header] ^ 1]) + data[header + 1 :],
            2,
            "not a valid tar header",
        ),
        (lambda data, header: data[: header + 300], 2, "cut inside the header"),
        (lambda data, header: data[:header], 2, "without an end marker"),
        (lambda data, header: data[:header] + bytes(1024) + data[header + 1024 :], 2, "other data after it"),
        (lambda data, header: b"<html>not found</html>" * 100, 0, "not a valid tar header"),
        (lambda data, header: b"", 0, "without an end marker"),
    ],
)
def test_other_damage_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, kept: int, clause: str
) -> None:  # type: ignore[no-untyped-def]
    write_tar(tmp_path / "trainA" / "good.tar", images(2))
    shard = tmp_path / "trainA" / "x.tar"
    write_tar(shard, images(5, first=10))
    header = scan_shard(shard).samples[2].offset - 512
    shard.write_bytes(damage(shard.read_bytes(), header))
    assert list(open_source(tmp_path, "trainA").counts) == [2, kept]
    [message] = [record.getMessage() for record in caplog.records]
    assert clause in message and str(shard) in message and f"The {kept} samples" in message


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("/etc/x.png", tarfile.REGTYPE)], "leads out of its folder"),
        ([("a/../../x.png", tarfile.REGTYPE)], "leads out of its folder"),
        ([("x.png", tarfile.SYMTYPE)], "holds a symbolic link, 'x.png'"),
        ([("x.png", tarfile.LNKTYPE)], "holds a hard link"),
        ([("x.png", tarfile.CHRTYPE)], "holds a character device"),
        ([("x.png", tarfile.GNUTYPE_SPARSE)], "holds a sparse file"),
        ([("x.png", b"Q")], "unknown type b'Q'"),
        ([("a.png", b"0"), ("b.png", b"0"), ("a.png", b"0")], "the key 'a' in two places"),
        ([("img.v1.001.jpg", b"0"), ("img.v1.002.jpg", b"0")], "a second image, 'img.v1.002.jpg', under the key 'img'"),
    ],
)
def test_what_no_data_set_should_hold_is_refused(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info, io.BytesIO())
    with pytest.raises(ValueError, match=r"^The shard .*x.tar holds") as caught:
        scan_shard(tmp_path / "x.tar")
    assert reason in str(caught.value)


def resized(header: bytes, field: bytes) -> bytes:
    header = header[:124] + field + header[136:]
    return header[:148] + b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:])) + header[156:]


def test_sizes_beyond_octal(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    write_tar(shard, images(2))
    expected = scan_shard(shard).samples
    data = shard.read_bytes()
    shard.write_bytes(resized(data[:512], b"\x80" + expected[0].size.to_bytes(11, "big")) + data[512:])
    assert scan_shard(shard).samples == expected


def test_sizes_in_pax_records(tmp_path: Path) -> None:
    content = encoded(noise(0))
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(content), {"size": str(len(content))}
        tar.addfile(info, io.BytesIO(content))
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:1024] + resized(data[1024:1536], b"0" * 11 + b"\0") + data[1536:])
    [sample] = scan_shard(tmp_path / "x.tar").samples
    assert (sample.key, sample.offset, sample.size) == ("a", 1536, len(content))


def test_ranks_may_write_the_index_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", images(20))
    built = index.build_index([tmp_path / "x.tar"])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3, timeout=20)
    monkeypatch.setattr(index.os, "fsync", lambda _: barrier.wait())  # all have written, none has published
    ranks = [context.Process(target=index.save_index, args=(built, tmp_path / "index.npz")) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert load_index(tmp_path / "index.npz").fingerprint() == built.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.npz", "x.tar"]


def test_index_of_other_shards_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "trainA" / "x.tar", images(2))
    open_source(tmp_path, "trainA")
    write_tar(tmp_path / "trainA" / "y.tar", images(2))
    (tmp_path / "trainA" / "x.tar").unlink()
    with pytest.raises(ValueError, match=r"x.tar is missing, y.tar is not in the index"):
        open_source(tmp_path, "trainA")


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "trainA" / "x.tar", images(2))
    open_source(tmp_path, "trainA")
    stored = tmp_path / "trainA" / "index.npz"
    data = stored.read_bytes()
    for content in (data[: len(data) // 2], b"", b"x" * 300, data.replace(b"counts.npy", b"c0unts.npy")):
        stored.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be used .* Delete it"):
            load_index(stored)


def test_read_only_folder_keeps_the_index_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    write_tar(tmp_path / "trainA" / "x.tar", images(2))
    monkeypatch.setattr(index.os, "replace", read_only)
    assert len(contents(tmp_path)) == 2
    assert "cannot be written (Read-only file system), so it is kept in memory" in caplog.text
    assert [path.name for path in (tmp_path / "trainA").iterdir()] == ["x.tar"]


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_OPEN_SHARDS", 2)
    for number in range(5):
        write_tar(tmp_path / "trainA" / f"{number}.tar", images(2, first=2 * number))
    source = open_source(tmp_path, "trainA")
    assert [source.read(i)[0] for i in np.random.default_rng(0).permutation(10)] == [
        f"{i:04d}" for i in np.random.default_rng(0).permutation(10)
    ]


def test_keys_behave_like_a_list() -> None:
    names = ["a", "", "zoë", "d/e"]
    keys = Keys.of(names)
    assert list(keys) == names and keys[-1] == "d/e" and keys[1:3] == names[1:3]
    with pytest.raises(IndexError):
        keys[4]
    assert list(Keys.of([])) == []
