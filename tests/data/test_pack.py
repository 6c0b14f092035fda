"""Packing keeps the images, and what cannot be packed is named."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.pack import main, pack
from tests.data.builders import encoded, noise

LAUNCHER = Path(__file__).parents[2] / "launchers" / "pack.py"


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def read(root: Path, name: str) -> dict[str, bytes]:
    source = open_source(root, name)
    return dict(source.read(i) for i in range(sum(source.counts)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files = {
        "trainA/one.v1.jpg": encoded(noise(1), "JPEG"),
        "trainA/one.v2.JPG": encoded(noise(2), "JPEG"),
        "trainA/one_v1.png": encoded(noise(3)),
        "trainA/deep.er/x.webp": encoded(noise(4), "WEBP"),
        "trainA/" + "long" * 30 + "/y.tif": encoded(noise(5), "TIFF"),
        "trainB/é.png": encoded(noise(6)),
    }
    write(tmp_path / "source", files)
    return tmp_path / "source"


def test_round_trip_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "100%d packed"
    results = pack(source, target)
    assert [(r.domain, r.shards, r.sizes.total(), r.unreadable) for r in results] == [
        ("trainA", 1, 5, []),
        ("trainB", 1, 1, []),
    ]
    found = read(target, "trainA")
    assert list(found) == ["deep_er/x", "long" * 30 + "/y", "one_v1", "one_v2", "one_v1-2"]
    originals = [path.read_bytes() for path in (source / "trainA").rglob("*") if path.is_file()]
    assert sorted(found.values()) == sorted(originals)
    assert found["one_v1-2"] == (source / "trainA" / "one_v1.png").read_bytes()
    assert read(target, "trainB") == {"é": (source / "trainB" / "é.png").read_bytes()}
    assert sorted(path.name for path in target.iterdir()) == ["trainA", "trainB"]
    assert sorted(path.name for path in (target / "trainA").iterdir()) == ["000000.tar", "index.npz"]


def test_webdataset_reads_the_shards(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed")
    shard = str(tmp_path / "packed" / "trainA" / "000000.tar")
    theirs = {
        s["__key__"]: next(v for k, v in s.items() if not k.startswith("_"))
        for s in webdataset.WebDataset(shard, shardshuffle=False)
    }
    assert theirs == read(tmp_path / "packed", "trainA")


def test_packing_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in "xy":
        pack(source, tmp_path / name)
    for name in ("000000.tar", "index.npz"):
        one, two = ((tmp_path / target / "trainA" / name).read_bytes() for target in "xy")
        assert one == two


def test_shards_are_divided_by_size(tmp_path: Path) -> None:
    write(tmp_path / "source", {f"trainA/{i}.bmp": encoded(noise(i, 300, 400), "BMP") for i in range(5)})
    [result] = pack(tmp_path / "source", tmp_path / "packed", shard_size_mb=1)
    assert result.shards == 2 and open_source(tmp_path / "packed", "trainA").counts == [3, 2]


@pytest.mark.parametrize("flat", [True, False])
def test_side_by_side_pairs_are_cut_without_loss(tmp_path: Path, flat: bool) -> None:
    left, middle, right = noise(1, 6, 5), noise(2, 6, 1), noise(3, 6, 5)
    whole = {"p.png": encoded(np.hstack([left, right])), "q.png": encoded(np.hstack([left, middle, right]))}
    write(tmp_path / "source" / ("" if flat else "val"), whole)
    pack(tmp_path / "source", tmp_path / "packed", side_by_side=True)
    split = "train" if flat else "val"
    for domain, expected in (("A", left), ("B", right)):
        found = read(tmp_path / "packed", split + domain)
        assert list(found) == ["p", "q"]
        for data in found.values():
            np.testing.assert_array_equal(decode_image(data), expected)


def test_resize_reduces_and_never_enlarges(tmp_path: Path) -> None:
    files = {
        "trainA/large.jpg": encoded(noise(1, 40, 60), "JPEG"),
        "trainA/tall.tif": encoded(noise(2, 64, 32), "TIFF"),
        "trainA/small.png": encoded(noise(3, 8, 12)),
    }
    write(tmp_path / "source", files)
    pack(tmp_path / "source", tmp_path / "packed", resize=20)
    found = read(tmp_path / "packed", "trainA")
    images = {key: Image.open(io.BytesIO(data)) for key, data in found.items()}
    assert {key: (image.format, image.size) for key, image in images.items()} == {
        "large": ("JPEG", (30, 20)),
        "tall": ("PNG", (20, 40)),
        "small": ("PNG", (12, 8)),
    }
    assert found["small"] == files["trainA/small.png"]


def test_a_crop_keeps_its_box(tmp_path: Path) -> None:
    tall = noise(1, 12, 9)
    files = {
        "trainA/a.png": encoded(tall),
        "trainA/b.jpg": encoded(noise(2, 40, 40), "JPEG"),
        "trainA/c.png": encoded(noise(3, 40, 8)),
    }
    write(tmp_path / "source", files)
    [result] = pack(tmp_path / "source", tmp_path / "packed", crop=(2, 1, 9, 12))
    found = read(tmp_path / "packed", "trainA")
    np.testing.assert_array_equal(decode_image(found["a"]), tall[1:12, 2:9])
    assert Image.open(io.BytesIO(found["b"])).format == "JPEG" and decode_image(found["b"]).shape == (11, 7, 3)
    assert result.unreadable == [
        f"{tmp_path / 'source' / 'trainA' / 'c.png'}: has 8x40 pixels, into which the crop does not fit"
    ]
    pack(tmp_path / "source", tmp_path / "small", crop=(0, 0, 8, 10), resize=4)
    assert decode_image(read(tmp_path / "small", "trainA")["a"]).shape == (5, 4, 3)


def test_unreadable_images_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "source", {"trainA/bad.jpg": b"no", "trainA/good.png": encoded(noise(0)), "trainB/bad.png": b""})
    assert main([str(tmp_path / "source"), str(tmp_path / "packed")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"left out: {tmp_path / 'source' / 'trainA' / 'bad.jpg'}: not an image")
    assert printed[2].split()[:6] == ["domain", "images", "shards", "bytes", "left", "out"]
    assert printed[3].split()[0:3] == ["trainA", "1", "1"] and printed[3].split()[4:] == ["1", "8x8:", "1"]
    assert printed[4].split() == ["trainB", "0", "0", "0", "1"]
    assert not (tmp_path / "packed" / "trainB").exists()
    (tmp_path / "source" / "trainA" / "good.png").unlink()
    assert main([str(tmp_path / "source"), str(tmp_path / "none")]) == 2
    assert "None of the images" in capsys.readouterr().err


def test_target_in_use(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    pack(source, target)
    with pytest.raises(ValueError, match="is not empty; give another folder, or --overwrite"):
        pack(source, target)
    (source / "trainA" / "one_v1.png").unlink()
    pack(source, target, overwrite=True)
    assert len(read(target, "trainA")) == 4
    (target / "trainB" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"mine.txt is not part of a packed data set"):
        pack(source, target, overwrite=True)
    assert (target / "trainB" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent", "t"], "The source absent is not a folder"),
        (["source", "source/packed"], "lies in the source"),
        (["source", "t", "--resize", "0"], "must be at least 1 pixel"),
        (["source", "t", "--crop", "5,0,5,9"], "The crop is 5,0,5,9; it must be LEFT,TOP,RIGHT,BOTTOM"),
        (["source", "t", "--crop", "0,-1,5,9"], "The crop is 0,-1,5,9"),
        (["source", "t", "--crop", "0,0,5,9", "--side-by-side"], "leave out --crop and labels, or --side-by-side"),
        (["source", "t", "--side-by-side"], "should hold train/ test/ val/ or images"),
    ],
)
def test_bad_input_ends_with_a_sentence(
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_launcher_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCHER), "absent", "packed"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "pack.py: The source absent is not a folder; give the folder that holds the data set.\n"
