"""What is read depends on the position alone: not on ranks, workers, resumes or broken samples."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from i2i_dist.data.batch import BadSample, HostBatch, to_device
from i2i_dist.data.decode import decode_image
from i2i_dist.data.order import SampleOrder
from i2i_dist.data.reader import Reader, micro_batches
from i2i_dist.data.transforms import Transform
from tests.data.builders import encoded, noise, reader_of, write_folder
from tests.needs import DEVICES

JITTER = Transform(load_size=12, crop_size=8, flip=True, full_size_from=None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "trainA", 7, seed=1)
    write_folder(root / "trainB", 5, seed=2)
    return root


def run(
    reader: Reader, world: int, *, micro: int = 1, start: int = 0, stop: int = 48, workers: int = 0
) -> list[list[HostBatch]]:
    """The micro-batches of each rank, with a global batch of 12."""
    return [
        list(
            micro_batches(
                reader,
                global_batch=12,
                micro_batch=micro,
                rank=rank,
                world=world,
                start=start,
                stop=stop,
                workers=workers,
            )
        )
        for rank in range(world)
    ]


def pictures(ranks: list[list[HostBatch]]) -> dict[int, bytes]:
    """Everything about the images, by position."""
    found = {}
    for batch in (batch for rank in ranks for batch in rank):
        for row, position in enumerate(batch.positions.tolist()):
            assert position not in found
            assert batch.update_position == position // 12 * 12
            found[position] = b"".join(batch.images[domain][row].numpy().tobytes() for domain in "ab")
    return found


def bad_samples(ranks: list[list[HostBatch]]) -> list[BadSample]:
    return sorted(bad for rank in ranks for batch in rank for bad in batch.bad)


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (1, 12), (2, 2), (3, 4), (4, 1), (6, 2)])
def test_any_number_of_ranks_reads_the_same(root: Path, world: int, micro: int) -> None:
    reader = reader_of(root, transform=JITTER)
    expected = pictures(run(reader, 1))
    assert list(expected) == list(range(48))
    ranks = run(reader_of(root, transform=JITTER), world, micro=micro)
    assert {len(rank) for rank in ranks} == {4 * 12 // world // micro}
    assert pictures(ranks) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, workers: int) -> None:
    reader = reader_of(root, transform=JITTER)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    [expected], [found] = run(reader, 1, micro=4), run(reader, 1, micro=4, workers=workers)
    assert torch.equal(torch.get_rng_state(), state)
    assert [b.positions.tolist() for b in found] == [b.positions.tolist() for b in expected]
    assert pictures([found]) == pictures([expected])
    assert all(isinstance(b.bad, tuple) for b in found)


@pytest.mark.parametrize("start", [0, 12, 36])
def test_resume_at_any_update(root: Path, start: int) -> None:
    whole = pictures(run(reader_of(root, transform=JITTER), 2))
    resumed = pictures(run(reader_of(root, transform=JITTER), 3, start=start))
    assert resumed == {position: picture for position, picture in whole.items() if position >= start}


def test_tiny_data_gives_every_rank_the_same_number_of_steps(tmp_path: Path) -> None:
    write_folder(tmp_path / "trainA", 3)
    write_folder(tmp_path / "trainB", 1)
    ranks = run(reader_of(tmp_path), 4, micro=3)
    assert [len(rank) for rank in ranks] == [4, 4, 4, 4]
    assert all(batch.images["a"].shape == (3, 8, 8, 3) for rank in ranks for batch in rank)


def test_sizes_that_do_not_fit_are_refused(root: Path) -> None:
    reader = reader_of(root)
    with pytest.raises(ValueError, match="must be a multiple of 10"):
        run(reader, 5, micro=2)
    with pytest.raises(ValueError, match="from 6 to 48 images"):
        run(reader, 1, start=6)


def break_images(root: Path) -> None:
    write_folder(root / "trainA", 7, seed=1)
    write_folder(root / "trainB", 5, seed=2)
    (root / "trainA" / "003.png").write_bytes(b"not an image")
    whole = encoded(noise(0, 64, 64), "JPEG")
    (root / "trainB" / "001.jpg").write_bytes(whole[: len(whole) // 2])


def test_broken_images_are_named_and_replaced_alike_at_every_world_size(tmp_path: Path) -> None:
    break_images(tmp_path)
    expected = run(reader_of(tmp_path), 1)
    broken = bad_samples(expected)
    assert {(bad.domain, bad.key) for bad in broken} == {("a", "003.png"), ("b", "001.jpg")}
    assert len(set(broken)) == len(broken)
    assert next(b.reason for b in broken if b.domain == "a").startswith("not an image")
    order = SampleOrder([7], 5, "a")
    assert {b.position for b in broken if b.domain == "a"} == {p for p in range(48) if order.index(p)[1] == 3}
    for world, micro, workers in [(2, 3, 0), (3, 2, 0), (4, 1, 0), (6, 2, 0), (1, 6, 2)]:
        ranks = run(reader_of(tmp_path), world, micro=micro, workers=workers)
        assert pictures(ranks) == pictures(expected)
        assert bad_samples(ranks) == broken
        assert {batch.images["a"].shape for rank in ranks for batch in rank} == {(micro, 8, 8, 3)}


@pytest.mark.parametrize("workers", [0, 1])
def test_keys_name_the_pictures_that_are_shown_and_of_broken_ones_their_substitutes(
    tmp_path: Path, workers: int
) -> None:
    break_images(tmp_path)
    (batches,) = run(reader_of(tmp_path, transform=JITTER), 1, micro=4, workers=workers)
    seen: dict[str, set[str]] = {"a": set(), "b": set()}
    for batch in batches:
        for domain, keys in batch.keys.items():
            for key, image, position in zip(keys, batch.images[domain], batch.positions.tolist(), strict=True):
                picture = decode_image((tmp_path / f"train{domain.upper()}" / key).read_bytes())
                shown = JITTER(picture, seed=5, draw=domain, position=position)
                np.testing.assert_array_equal(image.numpy(), shown)
            seen[domain].update(keys)
    assert seen == {"a": {f"00{n}.png" for n in (0, 1, 2, 4, 5, 6)}, "b": {f"00{n}.png" for n in range(5)}}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_domain_without_usable_images_ends_training_with_its_name(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path / "trainA", 3)
    (tmp_path / "trainB").mkdir()
    (tmp_path / "trainB" / "x.png").write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"^100 samples in a row of domain 'b' \(trainB\)[^:]*:\n  x.png: not an image"
    ):
        run(reader_of(tmp_path), 1, workers=workers)


def test_a_file_that_vanishes_is_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "trainA", 4)
    write_folder(tmp_path / "trainB", 4)
    reader = reader_of(tmp_path)
    (tmp_path / "trainA" / "002.png").unlink()
    assert {bad.key for bad in bad_samples(run(reader, 1))} == {"002.png"}


def test_crops_flips_and_the_decay_phase(tmp_path: Path) -> None:
    for domain in "AB":
        (tmp_path / f"train{domain}").mkdir()
        (tmp_path / f"train{domain}" / "one.png").write_bytes(encoded(noise(0, 20, 30)))
    transform = Transform(load_size=12, crop_size=8, flip=True, full_size_from=100)
    reader = reader_of(tmp_path, transform=transform)
    early = reader.read(range(0, 60), 0).images
    assert len({image.numpy().tobytes() for image in early["a"]}) > 30  # 5 x 5 crops, two directions
    assert not torch.equal(early["a"], early["b"])
    late = reader.read(range(100, 160), 100).images["a"]
    kinds, counts = np.unique(late.numpy().reshape(60, -1), axis=0, return_counts=True)
    assert len(kinds) == 2 and counts.min() > 15
    np.testing.assert_array_equal(kinds[0].reshape(8, 8, 3), kinds[1].reshape(8, 8, 3)[:, ::-1])


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_size is 9 and load_size 8"):
        Transform(load_size=8, crop_size=9, flip=False, full_size_from=None)


@pytest.mark.parametrize("device", DEVICES)
def test_to_device_normalises(root: Path, device: str) -> None:
    host = reader_of(root).read(range(24, 28), 24)
    if device == "cuda":
        host = host.pinned()
        assert all(pixels.is_pinned() for pixels in host.images.values())
    batch = to_device(host, torch.device(device))
    assert batch.a.shape == (4, 3, 8, 8) and batch.a.dtype == torch.float32 and batch.a.is_contiguous()
    assert batch.a.device.type == device
    expected, tolerance = host.images["b"].permute(0, 3, 1, 2) / 127.5 - 1, {"cpu": 0.0, "cuda": 2.0**-23}[device]
    torch.testing.assert_close(batch.b.cpu(), expected, rtol=0.0, atol=tolerance)  # GPUs multiply by 1 / 127.5
    assert batch.positions.tolist() == [24, 25, 26, 27] and batch.update_position == 24
    assert host.images["a"][0, 0, 0, 1] == 1  # the colour that names domain A


class _SignalProbe(Reader):
    def read(
        self, positions: range, update_position: int, stream: str | None = None, place: int | None = None
    ) -> HostBatch:
        ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
        facts = torch.tensor([*ignored, torch.get_num_threads() == 1])
        return HostBatch({"a": facts}, torch.tensor([os.getpid()]), update_position, (), {})


def test_workers_leave_signals_to_the_parent(root: Path) -> None:
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        probe = _SignalProbe({}, seed=0, transform=JITTER)
        batches: Iterator[HostBatch] = micro_batches(
            probe, global_batch=1, micro_batch=1, rank=0, world=1, start=0, stop=2, workers=1
        )
        facts = list(batches)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert all(batch.images["a"].all() and batch.positions.item() != os.getpid() for batch in facts)


def test_reading_matches_the_files(root: Path) -> None:
    reader = reader_of(root)
    seen = {int(image[0, 0, 0]) for image in reader.read(range(7), 0).images["a"]}
    assert seen == {int(decode_image((root / "trainA" / f"{i:03d}.png").read_bytes())[0, 0, 0]) for i in range(7)}
