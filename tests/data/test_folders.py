"""Folders of images are found at any depth, and a missing one is answered with what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from i2i_dist.data.batch import BadData
from i2i_dist.data.folders import open_source
from tests.data.builders import encoded, noise, write_folder


def test_images_of_any_depth_and_case(tmp_path: Path) -> None:
    folder = tmp_path / "trainA"
    for name in ("b.JPG", "a/2.png", "a/deep/1.Tiff", "c.webp", ".hidden.png", ".cache/x.png", "notes.txt", "d.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.bmp").write_bytes(b"e")
    (folder / "z").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    source = open_source(tmp_path, "trainA")
    assert list(source.keys) == ["a/2.png", "a/deep/1.Tiff", "b.JPG", "c.webp", "z/e.bmp"]
    assert list(source.counts) == [5] and source.name == "trainA"
    assert source.read(2) == ("b.JPG", b"b.JPG")


def test_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path / "trainA", 3)
    first = open_source(tmp_path, "trainA").fingerprint
    assert open_source(tmp_path, "trainA").fingerprint == first
    (tmp_path / "trainA" / "001.png").write_bytes(encoded(noise(0)))
    second = open_source(tmp_path, "trainA").fingerprint
    (tmp_path / "trainA" / "001.png").rename(tmp_path / "trainA" / "0001.png")
    assert len({first, second, open_source(tmp_path, "trainA").fingerprint}) == 3


def test_a_file_that_changes_while_training_is_bad(tmp_path: Path) -> None:
    write_folder(tmp_path / "trainA", 1)
    source = open_source(tmp_path, "trainA")
    (tmp_path / "trainA" / "000.png").write_bytes(b"short")
    with pytest.raises(BadData, match="has 5 bytes, but"):
        source.read(0)


@pytest.mark.parametrize("empty", [False, True])
def test_missing_or_empty_domain_shows_the_trees(tmp_path: Path, empty: bool) -> None:
    write_folder(tmp_path / "horse2zebra" / "trainA", 3)
    (tmp_path / "pictures.tar.gz").write_bytes(b"")
    if empty:
        (tmp_path / "trainB").mkdir()
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path, "trainB")
    message = str(caught.value)
    assert f"{tmp_path / 'trainB'} {'holds no images' if empty else 'is not there'}" in message
    for line in ("  trainA/  images of domain A to train with", "  testB/   images of domain B to test with"):
        assert line in message
    assert "  horse2zebra/trainA/  3 images" in message
    assert "  ./  0 images, 1 compressed tar files (decompress them" in message
    assert "--side-by-side" not in message
    assert ("  trainB/  0 images" in message) == empty


def test_missing_root_and_side_by_side_layouts_are_recognised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: .*absent is not a folder"):
        open_source(tmp_path / "absent", "trainA")
    write_folder(tmp_path / "train", 2)
    with pytest.raises(ValueError, match=r"launchers/pack.py --side-by-side"):
        open_source(tmp_path, "trainA")


def test_shards_without_any_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "trainA").mkdir()
    (tmp_path / "trainA" / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path, "trainA")
