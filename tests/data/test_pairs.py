"""Pairs stay pairs: found by name, cropped and mirrored alike, replaced together, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2i_dist.data.batch import HostBatch
from i2i_dist.data.folders import open_source
from i2i_dist.data.pack import pack
from i2i_dist.data.pairs import paired
from i2i_dist.data.reader import Reader, micro_batches
from i2i_dist.data.transforms import Transform
from tests.data.builders import PLAIN, encoded, noise

JITTER = Transform(load_size=12, crop_size=8, flip=True, full_size_from=None)
COUNT = 7


def pairs(root: Path, transform: Transform = PLAIN) -> Reader:
    a, b = (open_source(root, f"train{side}") for side in "AB")
    return Reader({"a": a, "b": paired(a, b)}, seed=5, transform=transform, streams=("paired",))


def write_pair(root: Path, name: str, number: int, *, into: str = "AB") -> None:
    """B is the negative of A, so that a pair shows itself at every pixel; its file has another suffix."""
    pixels = noise(number, 12, 12)
    for side, values, suffix in (("A", pixels, "png"), ("B", 255 - pixels, "bmp")):
        if side in into:
            path = root / f"train{side}" / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(values, suffix.upper()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Names whose order differs with the suffix: "x1.c.png" comes before "x1.png", "x1.bmp" before "x1.c.bmp"."""
    for number, name in enumerate(["x1", "x1.c", "deep/x1", "y", "z", "z.tar", "é"]):
        write_pair(tmp_path, name, number)
    orders = [[Path(key).with_suffix("") for key in open_source(tmp_path, f"train{side}").keys] for side in "AB"]
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])
    return tmp_path


def run(reader: Reader, world: int, *, micro: int = 1, workers: int = 0) -> list[HostBatch]:
    sizes = {"global_batch": 12, "micro_batch": micro, "world": world, "start": 0, "stop": 48, "workers": workers}
    return [batch for rank in range(world) for batch in micro_batches(reader, rank=rank, **sizes)]


def assert_pairs(batches: list[HostBatch]) -> None:
    for batch in batches:
        a, b = (batch.images[domain].int() for domain in "ab")
        # Resampling rounds each of the two for itself.
        assert int((a + b - 255).abs().max()) <= 1


def by_position(batches: list[HostBatch]) -> dict[int, bytes]:
    return {
        position: batch.images["a"][row].numpy().tobytes() + batch.images["b"][row].numpy().tobytes()
        for batch in batches
        for row, position in enumerate(batch.positions.tolist())
    }


def test_a_pair_is_cropped_and_mirrored_alike(root: Path) -> None:
    batches = run(pairs(root, JITTER), 1, micro=12)
    assert_pairs(batches)
    assert len(set(by_position(batches).values())) > 40  # of 7 pairs, in 5 x 5 places and two directions


def test_unpaired_they_are_not(root: Path) -> None:
    a, b = (open_source(root, f"train{side}") for side in "AB")
    apart = Reader({"a": a, "b": paired(a, b)}, seed=5, transform=PLAIN)
    with pytest.raises(AssertionError):
        assert_pairs(run(apart, 1, micro=12))


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 4, 2), (2, 2, 0), (3, 1, 0), (4, 3, 1), (6, 2, 0)])
def test_any_number_of_ranks_and_workers_reads_the_same(root: Path, world: int, micro: int, workers: int) -> None:
    expected = by_position(run(pairs(root, JITTER), 1, micro=12))
    assert list(expected) == list(range(48))
    assert by_position(run(pairs(root, JITTER), world, micro=micro, workers=workers)) == expected


def test_every_epoch_shows_every_pair(root: Path) -> None:
    images = pairs(root).read(range(3 * COUNT), 0).images["a"].numpy().reshape(3, COUNT, -1)
    assert all(len({picture.tobytes() for picture in epoch}) == COUNT for epoch in images)


@pytest.mark.parametrize("side", ["A", "B", "AB"])
def test_a_broken_picture_takes_its_partner_with_it(root: Path, side: str) -> None:
    for each, name in (("A", "y.png"), ("B", "y.bmp")):
        if each in side:
            (root / f"train{each}" / name).write_bytes(b"not an image")
    expected = run(pairs(root, JITTER), 1)
    assert_pairs(expected)
    broken = {(bad.domain, bad.key) for batch in expected for bad in batch.bad}
    assert broken == {("b", "y.bmp") if side == "B" else ("a", "y.png")}
    for world, micro, workers in [(2, 3, 0), (4, 1, 0), (1, 6, 2)]:
        found = run(pairs(root, JITTER), world, micro=micro, workers=workers)
        assert by_position(found) == by_position(expected)
        assert {bad for batch in found for bad in batch.bad} == {bad for batch in expected for bad in batch.bad}


def test_a_domain_without_usable_images_ends_training_with_its_name(root: Path) -> None:
    for path in (root / "trainB").rglob("*.bmp"):
        path.write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"100 samples in a row of domain 'a' \(trainA\) and 'b' \(trainB\) could not be used"
    ):
        run(pairs(root), 1)


def test_pictures_without_a_partner_are_named(root: Path) -> None:
    for number in range(7):
        write_pair(root, f"only{number}", number, into="A")
    write_pair(root, "deep/alone", 1, into="B")
    with pytest.raises(ValueError) as caught:
        pairs(root)
    message = str(caught.value)
    assert "The pictures of trainA (14) and trainB (8) are no pairs" in message
    assert "\n  only in trainA: only0, only1, only2, only3, only4 and 2 more\n" in message
    assert "\n  only in trainB: deep/alone\n" in message
    assert "Rename them, or remove what has no partner." in message


@pytest.mark.parametrize("side", "AB")
def test_two_pictures_of_one_name_are_refused(root: Path, side: str) -> None:
    (root / f"train{side}" / "y.tif").write_bytes(encoded(noise(0), "TIFF"))
    with pytest.raises(
        ValueError, match=f"In train{side} several pictures have the same name, .* not known: y. Rename"
    ):
        pairs(root)


def test_a_packed_folder_pairs_up(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("packed")
    pack(root, target)
    assert_pairs(run(pairs(target, JITTER), 1, micro=12))
    shards, folders = (pairs(place).read(range(COUNT), 0).images["a"].numpy() for place in (target, root))
    assert {image.tobytes() for image in shards} == {image.tobytes() for image in folders}


def test_shards_of_one_domain_and_a_folder_of_the_other_pair_up(tmp_path: Path) -> None:
    for number in range(COUNT):
        write_pair(tmp_path / "in", f"{number:03d}", number)
    pack(tmp_path / "in", tmp_path / "packed")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "trainA").symlink_to(tmp_path / "packed" / "trainA")
    (tmp_path / "mixed" / "trainB").symlink_to(tmp_path / "in" / "trainB")
    assert_pairs(run(pairs(tmp_path / "mixed", JITTER), 1, micro=12))


@pytest.mark.parametrize("swap", [False, True])
def test_pictures_side_by_side_pair_up(tmp_path: Path, swap: bool) -> None:
    """Of several shards, which the two domains divide differently, and with a picture that cannot be read."""
    for number in range(COUNT):
        flat = np.full((400, 400, 3), number, dtype=np.uint8)  # compresses well, noise does not
        whole = np.hstack([255 - flat, flat]) if swap else np.hstack([flat, 255 - flat])
        whole[:40, :400] = noise(number, 40, 400) if number % 2 else whole[:40, :400]
        (tmp_path / "in" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(whole).save(tmp_path / "in" / "train" / f"{number}.png")
    (tmp_path / "in" / "train" / "3.png").write_bytes(b"broken")
    pack(tmp_path / "in", tmp_path / "out", side_by_side=True, swap=swap)
    a, b = (open_source(tmp_path / "out", f"train{side}") for side in "AB")
    assert list(a.keys) == list(b.keys) == list("012456")
    images = pairs(tmp_path / "out").read(range(6), 0).images
    below_the_noise = {domain: images[domain][:, 4:, :, 0].int() for domain in "ab"}
    assert int((below_the_noise["a"] + below_the_noise["b"] - 255).abs().max()) <= 1
    assert int(below_the_noise["a"].max()) <= COUNT


def test_swapping_without_halves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--swap says which half of a picture is A, so it needs --side-by-side"):
        pack(tmp_path, tmp_path / "out", swap=True)
