"""Streams of labelled and unlabelled pictures: what is read depends on the position alone, and labels fit pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from i2i_dist.data.batch import BadSample, HostBatch, LabelledBatch, to_device
from i2i_dist.data.folders import open_source
from i2i_dist.data.labels import LabelledSet, LabelSpace
from i2i_dist.data.reader import Reader, micro_batches
from i2i_dist.data.transforms import Transform
from tests.data.builders import PLAIN, encoded, write_tar

SPACE = LabelSpace(["big", "red", "blue"], exactly_one=[["red", "blue"]])  # 4 classes
CLASSES = np.random.default_rng(2).permutation(np.repeat(np.arange(4), [9, 12, 2, 7]))
BATCH, UPDATES = 16, 6
MakeReader = Callable[..., Reader]


def picture(sample: int) -> np.ndarray:
    """Of one colour, which says the sample and its class, and dark on the left, so that flips show."""
    pixels = np.full((8, 8, 3), (sample, CLASSES[sample], 200), dtype=np.uint8)
    pixels[:, :4, 2] = 100
    return pixels


def write(root: Path, broken: set[int]) -> None:
    members = []
    for sample in range(len(CLASSES)):
        label = dict(zip(SPACE.attributes, SPACE.classes[CLASSES[sample]].tolist(), strict=True))
        members.append((f"{sample:02d}.labels.json", str(label).replace("'", '"').encode()))
        members.append((f"{sample:02d}.png", b"nothing" if sample in broken else encoded(picture(sample))))
    write_tar(root / "trainA" / "x.tar", members)


@pytest.fixture
def make_reader(tmp_path: Path) -> MakeReader:
    def make(
        broken: set[int] = frozenset(), fraction: float = 0.5, group: tuple[int, int] | None = (2, 2), seed: int = 3
    ) -> Reader:  # type: ignore[assignment]
        if not (tmp_path / "trainA").exists():
            write(tmp_path, set(broken))
        source = open_source(tmp_path, "trainA")
        assert source.labels is not None
        labelled = LabelledSet(source.labels, SPACE, fraction, group, seed)
        streams = ("labelled", "unlabelled") if fraction < 1 else ("labelled",)
        transform = Transform(load_size=8, crop_size=8, flip=True, full_size_from=None)
        return Reader({"a": source}, seed=seed, transform=transform, streams=streams, labelled=labelled)

    return make


def run(
    reader: Reader, world: int = 1, micro: int = BATCH, start: int = 0, workers: int = 0, stop: int = UPDATES * BATCH
) -> list[HostBatch]:
    """The micro-batches of all ranks."""
    sizes = {"global_batch": BATCH, "micro_batch": micro, "world": world, "start": start, "stop": stop}
    return [b for rank in range(world) for b in micro_batches(reader, rank=rank, workers=workers, **sizes)]


def rows(batches: list[HostBatch]) -> dict[int, tuple[bytes, object, object]]:
    """Everything about a sample, by position."""
    found: dict[int, tuple[bytes, object, object]] = {}
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            assert position not in found
            labels, others = (None if x is None else tuple(x[row].tolist()) for x in (batch.labels, batch.others))
            found[position] = (batch.images["a"][row].numpy().tobytes(), labels, others)
    return found


def samples(batch: HostBatch) -> np.ndarray:
    return batch.images["a"][:, 0, 0, 0].numpy()


def assert_labels_fit(batches: list[HostBatch]) -> None:
    for batch in batches:
        if batch.labels is not None:
            assert batch.labels.dtype == torch.uint8 and batch.others is not None
            shown = batch.images["a"][:, 0, 0, 1].numpy()
            assert (batch.labels.numpy() == SPACE.classes[shown]).all()
            assert (shown == CLASSES[samples(batch)]).all()


def test_streams_take_turns_over_updates(make_reader: MakeReader) -> None:
    batches = run(make_reader())
    assert_labels_fit(batches)
    assert [batch.labels is None for batch in batches] == [False, True] * 3
    assert [batch.others is None for batch in batches] == [False, True] * 3
    told = {int(sample) for batch in batches[::2] for sample in samples(batch)}
    untold = {int(sample) for batch in batches[1::2] for sample in samples(batch)}
    assert len(told) <= 15 and not told & untold
    for batch in batches[::2]:
        groups = CLASSES[samples(batch)].reshape(4, 2, 2)  # [groups, classes, images]
        assert (groups == groups[..., :1]).all() and (groups[:, 0] != groups[:, 1]).all()


def test_a_stream_goes_on_where_it_was(make_reader: MakeReader) -> None:
    reader = make_reader()
    untold = np.concatenate([samples(batch) for batch in run(reader)[1::2]])  # 48 of its 15 pictures
    epochs = [sorted(untold[15 * epoch : 15 * (epoch + 1)].tolist()) for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] == sorted(set(untold.tolist())) and len(epochs[0]) == 15
    whole = reader.read(range(48), 0, "labelled", place=0)
    assert samples(whole).tolist() == np.concatenate([samples(batch) for batch in run(reader)[::2]]).tolist()


@pytest.mark.parametrize(
    ("world", "micro", "workers"), [(1, 4, 0), (1, 8, 2), (2, 8, 0), (2, 4, 1), (4, 4, 0), (4, 1, 0)]
)
def test_any_number_of_ranks_micro_batches_and_workers_reads_the_same(
    make_reader: MakeReader, world: int, micro: int, workers: int
) -> None:
    expected = rows(run(make_reader()))
    assert list(expected) == list(range(UPDATES * BATCH))
    assert len({picture for picture, _, _ in expected.values()}) > 25  # of 30 pictures, in two directions
    assert rows(run(make_reader(), world, micro, workers=workers)) == expected


@pytest.mark.parametrize("update", [1, 2, 5])
def test_resume_at_any_update(make_reader: MakeReader, update: int) -> None:
    whole = rows(run(make_reader()))
    resumed = rows(run(make_reader(), world=2, micro=8, start=update * BATCH))
    assert resumed == {position: row for position, row in whole.items() if position >= update * BATCH}


def test_with_all_labels_there_is_one_stream(make_reader: MakeReader) -> None:
    batches = run(make_reader(fraction=1.0, group=None))
    assert_labels_fit(batches)
    assert all(batch.labels is not None for batch in batches)
    drawn = np.concatenate([samples(batch) for batch in batches])  # 96 of 30 pictures
    assert all(sorted(drawn[30 * epoch : 30 * (epoch + 1)]) == list(range(30)) for epoch in range(3))


@pytest.mark.parametrize("group", [None, (2, 2)])
def test_a_broken_picture_is_replaced_by_one_of_its_stream_and_class(
    tmp_path: Path, make_reader: MakeReader, group: tuple[int, int] | None
) -> None:
    broken = {int(np.flatnonzero(np.equal(CLASSES, number))[place]) for number in (0, 1, 3) for place in (0, 3)}
    reader = make_reader(broken, group=group)
    known = open_source(tmp_path, "trainA").labels
    assert known is not None
    parts = LabelledSet(known, SPACE, 0.5, group, seed=3)
    order = {stream: parts.order(stream).sample for stream in reader.streams}  # what would have been drawn
    batches = run(reader)
    assert_labels_fit(batches)
    replaced: set[BadSample] = set()
    told = {order["labelled"](place) for place in range(400)}
    for number, batch in enumerate(batches):
        stream = ("labelled", "unlabelled")[number % 2]
        wanted = np.array([order[stream](number // 2 * BATCH + row) for row in range(BATCH)])
        got = samples(batch)
        hit = np.isin(wanted, list(broken))
        assert (got[~hit] == wanted[~hit]).all() and not np.isin(got, list(broken)).any()
        assert all((sample in told) == (stream == "labelled") for sample in got.tolist())
        if stream == "labelled" and group is not None:
            assert (CLASSES[got] == CLASSES[wanted]).all()
        assert {bad.position for bad in batch.bad} == {number * BATCH + row for row in np.flatnonzero(hit)}
        replaced |= set(batch.bad)
    assert {bad.domain for bad in replaced} == {"a"} and {int(bad.key) for bad in replaced} <= broken
    assert any(bad.position // BATCH % 2 for bad in replaced) and any(not bad.position // BATCH % 2 for bad in replaced)
    assert rows(run(make_reader(group=group), world=4, micro=4)) == rows(batches)


def test_others_are_labels_of_labelled_pictures_and_do_not_follow_the_picture(make_reader: MakeReader) -> None:
    batches = run(make_reader(), stop=100 * BATCH)[::2]
    others = SPACE.numbers(np.concatenate([batch.others.numpy() for batch in batches]))  # 800
    assert others.min() == 0
    # Of 30 pictures the labels of 15 are told: 2 of the rare class and 4 or 5 of each of the others.
    shares = np.bincount(others, minlength=4) / len(others)
    np.testing.assert_allclose(shares, np.array([5, 4, 2, 4]) / 15, atol=0.05)
    shown = SPACE.numbers(np.concatenate([batch.labels.numpy() for batch in batches]))
    assert abs((shown == others).mean() - 0.25) < 0.05
    alike = (others[::2] == others[1::2]).mean()  # neighbours have labels of their own
    assert abs(alike - (5**2 + 4**2 + 2**2 + 4**2) / 15**2) < 0.08


def test_to_device_makes_a_labelled_batch(make_reader: MakeReader) -> None:
    told, untold = run(make_reader(), stop=2 * BATCH)
    batch = to_device(told, torch.device("cpu"))
    assert isinstance(batch, LabelledBatch) and batch.images.shape == (BATCH, 3, 8, 8)
    assert batch.labels is not None and batch.others is not None
    assert batch.labels.dtype == batch.others.dtype == torch.float32
    assert torch.equal(batch.labels, told.labels.float()) and torch.equal(batch.others, told.others.float())
    assert torch.equal(batch.images, told.images["a"].permute(0, 3, 1, 2) / 127.5 - 1)
    without = to_device(untold, torch.device("cpu"))
    assert isinstance(without, LabelledBatch) and without.labels is None and without.others is None
    assert without.positions.tolist() == list(range(BATCH, 2 * BATCH)) and without.update_position == BATCH


def test_a_stream_without_pictures_is_refused(tmp_path: Path, make_reader: MakeReader) -> None:
    make_reader()
    source = open_source(tmp_path, "trainA")
    assert source.labels is not None
    labelled = LabelledSet(source.labels, SPACE, 1.0, None, seed=3)
    with pytest.raises(ValueError, match="none is left for the updates without labels"):
        Reader({"a": source}, seed=3, transform=PLAIN, streams=("labelled", "unlabelled"), labelled=labelled)
