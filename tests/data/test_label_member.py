"""Labels in shards: read wherever they stand in a sample, kept in the index, and refused where they are not valid."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from i2i_dist.data import index
from i2i_dist.data.folders import open_source
from i2i_dist.data.index import load_index
from i2i_dist.data.label_member import MAX_BYTES, decode_labels, encode_labels
from i2i_dist.data.tar import scan_shard
from tests.data.builders import encoded, noise, write_tar

IMAGE = encoded(noise(0))
UNLABELLED = (
    "9ddc623af135e46a9b25e741275c8e4159430af1b27ff9628a25d0110f161a76"  # of an index from before there were labels
)


def write(path: Path, *members: tuple[str, object]) -> None:
    """Write members; what is not bytes is written as JSON, and images are all alike."""
    contents = [
        (name, content if isinstance(content, bytes) else json.dumps(content).encode()) for name, content in members
    ]
    write_tar(path, contents)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_labels_stand_anywhere_in_a_sample(tmp_path: Path, form: int) -> None:
    labels = [json.dumps(label).encode() for label in ({"b": 1, "a": 0}, {"a": 1, "b": None}, {"a": 0, "b": 1})]
    members = [
        ("p.labels.json", labels[0]), ("p.png", IMAGE), ("p.txt", b"caption"),
        ("q.png", IMAGE), ("q.txt", b""), ("q.LABELS.json", labels[1]),
        ("r.json", b"not for us"), ("r.png", IMAGE),
        ("without_an_image.labels.json", labels[2]),
        ("d/v1/s.txt", b""), ("d/v1/s.labels.json", labels[2]), ("d/v1/s.png", IMAGE),
    ]  # fmt: skip
    write_tar(tmp_path / "trainA" / "x.tar", members, form)
    source = open_source(tmp_path, "trainA")
    assert list(source.keys) == ["p", "q", "r", "d/v1/s"]
    assert source.labels is not None and source.labels.attributes == ("a", "b")
    assert source.labels.values.dtype == np.int8
    assert source.labels.values.tolist() == [[0, 1], [1, -1], [-1, -1], [0, 1]]


def test_labels_are_kept_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "trainA" / "1.tar", ("p.png", IMAGE))
    write(tmp_path / "trainA" / "2.tar", ("q.png", IMAGE), ("q.labels.json", {"zoë": 1, "a b": 0}))
    write(tmp_path / "trainA" / "3.tar", ("r.labels.json", {"a b": 1, "zoë": 0}), ("r.png", IMAGE))
    first = open_source(tmp_path, "trainA")
    monkeypatch.setattr(index, "scan_shard", lambda _: pytest.fail("scanned again"))
    second = open_source(tmp_path, "trainA")
    for source in (first, second):
        assert source.labels is not None and source.labels.attributes == ("a b", "zoë")
        assert source.labels.values.tolist() == [[-1, -1], [0, 1], [1, 0]] and source.labels.values.dtype == np.int8
    assert first.fingerprint == second.fingerprint


def test_labels_enter_the_fingerprint(tmp_path: Path) -> None:
    labels = [None, {"a": 1, "b": 0}, {"a": 0, "b": 0}, {"a": 1, "c": 0}, {"b": 0, "a": 1}]
    for number, label in enumerate(labels):
        members = [] if label is None else [("p.labels.json", label)]
        write(tmp_path / str(number) / "x.tar", *members, ("p.png", IMAGE))
    found = [open_source(tmp_path, str(number)).fingerprint for number in range(5)]
    assert len(set(found[:4])) == 4 and found[4] == found[1]


def test_an_index_without_labels_is_as_it_was(tmp_path: Path) -> None:
    write_tar(tmp_path / "trainA" / "x.tar", [("p.png", b"picture"), ("p.json", b"{}")])
    source = open_source(tmp_path, "trainA")
    assert source.labels is None
    assert source.fingerprint == UNLABELLED
    stored = tmp_path / "trainA" / "index.npz"
    with np.load(stored) as arrays:
        assert "labels" not in arrays and "attributes" not in arrays
        kept = {name: arrays[name] for name in arrays}
    np.savez(stored, **kept)
    assert open_source(tmp_path, "trainA").fingerprint == UNLABELLED


def test_an_index_whose_labels_do_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "trainA" / "x.tar", ("p.labels.json", {"a": 1}), ("p.png", IMAGE))
    open_source(tmp_path, "trainA")
    stored = tmp_path / "trainA" / "index.npz"
    with np.load(stored) as arrays:
        kept = {name: arrays[name] for name in arrays}
    for change in ({"labels": np.zeros((2, 1), np.int8)}, {"attributes": np.array(["a", "b"])}):
        np.savez(stored, **kept | change)
        with pytest.raises(ValueError, match=r"labels differ in number from its samples\). Delete it"):
            load_index(stored)


def test_labels_cut_off_with_the_end_of_a_shard_are_not_known(tmp_path: Path) -> None:
    shard = tmp_path / "trainA" / "x.tar"
    label = {"a": 1}
    write(shard, ("p.png", IMAGE), ("p.labels.json", label), ("q.png", IMAGE), ("q.labels.json", label))
    with shard.open("r+b") as file:
        file.truncate(shard.read_bytes().index(b"q.labels.json") + 514)
    source = open_source(tmp_path, "trainA")
    assert list(source.keys) == ["p", "q"] and source.labels is not None
    assert source.labels.values.tolist() == [[1], [-1]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b'\xff\xfe{"a": 1}', "is not valid JSON"),
        (b'{"a": NaN}', "gives 'a' the value NaN; allowed are 1, 0, and null for not known"),
        (b"[" * 60_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
        (b"[1, 0]", "is not an object of attributes"),
        (b"1", "is not an object of attributes"),
        (b"{}", "is not an object of attributes"),
        (b'{"a": -1}', "gives 'a' the value -1"),
        (b'{"a": 2}', "gives 'a' the value 2"),
        (b'{"a": true}', "gives 'a' the value true"),
        (b'{"a": 1.0}', "gives 'a' the value 1.0"),
        (b'{"a": "1"}', "gives 'a' the value \"1\""),
        (b'{"a": {"b": 1}}', "gives 'a' the value of an object"),
        (b'{"a": [1]}', "gives 'a' the value of a list"),
        (b'{"a": 1, "a": 0}', "names 'a' twice"),
        (b'{" ": 1}', "names an attribute ' ', which is not printable text"),
        (b'{"a\\u0000": 1}', "names an attribute 'a\\x00', which is not printable text"),
        (b" " * MAX_BYTES + b'{"a": 1}', f"has {MAX_BYTES + 8} bytes, and labels have at most {MAX_BYTES}"),
        (b'{"b": 1}', "names other attributes than the samples before it: with b and without a"),
    ],
)
def test_labels_that_are_not_valid_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    shard = tmp_path / "x.tar"
    write(shard, ("p.labels.json", {"a": 1}), ("p.png", IMAGE), ("d/q.png", IMAGE), ("d/q.labels.json", content))
    with pytest.raises(ValueError) as caught:
        scan_shard(shard)
    message = str(caught.value)
    assert message.startswith(f"The shard {shard} holds 'd/q.labels.json', which {reason}"), message
    assert message.endswith("Pack the data again with launchers/pack.py, or leave such members out.")


def test_labels_stand_once_in_a_sample(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", ("p.labels.json", {"a": 1}), ("p.png", IMAGE), ("p.labels.json", {"a": 1}))
    with pytest.raises(ValueError, match="which is the second of its key"):
        scan_shard(tmp_path / "x.tar")


def test_shards_of_a_domain_have_the_same_attributes(tmp_path: Path) -> None:
    many = dict.fromkeys("bcdefgh", 0)
    write(tmp_path / "trainA" / "1.tar", ("p.labels.json", {"a": 1, "b": 0}), ("p.png", IMAGE))
    write(tmp_path / "trainA" / "2.tar", ("q.labels.json", many), ("q.png", IMAGE))
    with pytest.raises(ValueError, match=r"2.tar holds .* than 1.tar \(with c, d, e, f, g and 1 more and without a\)"):
        open_source(tmp_path, "trainA")


def test_what_is_written_is_read() -> None:
    content = encode_labels(["Male", "zoë", "5 o'Clock"], np.array([1, -1, 0], dtype=np.int8))
    assert content == '{"Male":1,"zoë":null,"5 o\'Clock":0}'.encode()
    assert list(decode_labels(content).items()) == [("5 o'Clock", 0), ("Male", 1), ("zoë", -1)]
