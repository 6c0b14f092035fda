"""Packing pictures with their labels: each picture has its own, in the domain that it belongs to, and tables say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.label_files import RAFD_EMOTIONS
from i2i_dist.data.labelled_domains import Labelling
from i2i_dist.data.labels import LabelledSet, LabelSpace, SampleLabels
from i2i_dist.data.pack import main, pack
from i2i_dist.data.packed import label_summary
from i2i_dist.data.synthetic_labels import ATTRIBUTES, label_space, read_labels, write_labelled_dataset
from tests.data.builders import encoded, noise

PICTURE = encoded(noise(0))


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)


def labels(root: Path, domain: str) -> dict[str, list[int]]:
    """The values of each key, by the sorted attributes."""
    source = open_source(root, domain)
    assert source.labels is not None
    return dict(zip(source.keys, source.labels.values.tolist(), strict=True))


def table(path: Path, *rows: str) -> Labelling:
    path.write_text("\n".join(rows) + "\n")
    return Labelling(csv=path)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path, Path]:
    return tmp_path / "source", tmp_path / "packed", tmp_path / "labels.csv"


def test_the_synthetic_set_keeps_its_labels(paths: tuple[Path, Path, Path]) -> None:
    source, packed, _ = paths
    write_labelled_dataset(source, train=40, test=10, seed=1)
    results = pack(source, packed, labelling=Labelling(csv=source / "labels.csv"))
    assert [(r.domain, r.sizes.total()) for r in results] == [("trainA", 40), ("testA", 10)]
    for domain in ("trainA", "testA"):
        shards = open_source(packed, domain)
        assert shards.labels is not None and shards.labels.attributes == tuple(sorted(ATTRIBUTES))
        shown = read_labels(np.stack([decode_image(shards.read(i)[1]) for i in range(sum(shards.counts))]))
        columns = [ATTRIBUTES.index(name) for name in shards.labels.attributes]
        assert (shards.labels.values == shown[:, columns]).all()
    known = open_source(packed, "trainA").labels
    assert known is not None
    assert LabelledSet(known, label_space(), 0.5, None, seed=0).counts == (20, 20, 0)


def test_webdataset_reads_the_labels(paths: tuple[Path, Path, Path]) -> None:
    source, packed, file = paths
    write(source, "trainA/x.png", "trainA/y.png")
    pack(source, packed, labelling=table(file, "name,b,a", "x.png,1,", "y.png,0,1"))
    shard = str(packed / "trainA" / "000000.tar")
    found = [sample["labels.json"] for sample in webdataset.WebDataset(shard, shardshuffle=False)]
    assert [json.loads(labels) for labels in found] == [{"b": 1, "a": None}, {"b": 0, "a": 1}]


def test_pictures_are_named_by_the_last_part_of_their_path(
    paths: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, packed, file = paths
    write(source, "trainA/x.png", "trainA/deep/y.png", "trainA/z.png", "testA/deep/y.png", "valA/v.png")
    rows = ["v.png,1,0", "trainA/deep/y.png,0,1", "testA/deep/y.png,1,1", "./x.png,0,0", "gone.png,1,1", "deep,1,1"]
    pack(source, packed, labelling=table(file, "name,a,b", *rows))
    assert labels(packed, "trainA") == {"deep/y": [0, 1], "x": [0, 0], "z": [-1, -1]}
    assert labels(packed, "testA") == {"deep/y": [1, 1]} and labels(packed, "valA") == {"v": [1, 0]}
    assert caplog.messages == [f"2 of the 6 pictures that {file} names are not there."]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["y.png,1"], r"labels.csv, line 2, names 'y.png', which .*trainA/deep/y.png and .*trainA/y.png both are"),
        (["x.png,1", "testA/x.png,1"], r"both line 3 \(testA/x.png\) and line 2 \(x.png\) name .*testA/x.png; leave"),
        (["w.png,1"], r"names none of the 3 pictures .*, such as 'trainA/deep/y.png', but for example 'w.png' in line"),
        ([], r"names none of the 3 pictures .*, such as 'trainA/deep/y.png'; check that the two belong together"),
    ],
)
def test_names_that_do_not_fit_the_pictures_are_refused(
    paths: tuple[Path, Path, Path], rows: list[str], sentence: str
) -> None:
    source, packed, file = paths
    write(source, "trainA/y.png", "trainA/deep/y.png", "testA/x.png")
    with pytest.raises(ValueError, match=sentence):
        pack(source, packed, labelling=table(file, "name,a", *rows))
    assert not packed.exists()


def test_attributes_are_chosen(paths: tuple[Path, Path, Path]) -> None:
    source, packed, file = paths
    write(source, "x.png", "y.png")
    labelling = table(file, "name,a,b,c d", "x.png,1,0,", "y.png,0,1,1")
    pack(source, packed, labelling=labelling._replace(attributes=("c d", "a")))
    assert labels(packed, "trainA") == {"x": [1, -1], "y": [0, 1]}  # a, c d
    with pytest.raises(ValueError, match=r"--attributes names e, f; there are a, b, c d"):
        pack(source, packed, labelling=labelling._replace(attributes=("e", "a", "f")), overwrite=True)
    with pytest.raises(ValueError, match="a stands twice in the attributes"):
        pack(source, packed, labelling=labelling._replace(attributes=("a", "a")), overwrite=True)
    with pytest.raises(ValueError, match="'a=1' cannot be written in labels and file names"):
        pack(source, packed, labelling=table(file, "name,a=1", "x.png,1"), overwrite=True)


def test_celeba_with_its_partition_and_crop(paths: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, packed, file = paths
    for number in range(1, 7):
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[20:198] = 40 * number
        (source / "img").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(source / "img" / f"{number}.png")
    file.write_text(
        "5\nBlack_Hair Bald Male\n" + "".join(f"{n}.png {(-1) ** n} -1 {1 if n > 2 else -1}\n" for n in range(1, 6))
    )
    partition = file.with_name("list_eval_partition.txt")
    partition.write_text("".join(f"{n}.png {part}\n" for n, part in enumerate([0, 0, 1, 2, 0, 0, 0], start=1)))
    options = ["--labels-celeba", str(file), "--partition", str(partition), "--crop", "0,20,178,198", "--resize", "89"]
    assert main([str(source), str(packed), *options, "--attributes", "Male,Black_Hair"]) == 0
    assert labels(packed, "trainA") == {"img/1": [0, 0], "img/2": [1, 0], "img/5": [0, 1], "img/6": [-1, -1]}
    assert labels(packed, "valA") == {"img/3": [0, 1]} and labels(packed, "testA") == {"img/4": [1, 1]}
    shards = open_source(packed, "testA")
    pixels = decode_image(shards.read(0)[1])
    assert pixels.shape == (89, 89, 3) and (pixels == 160).all()  # the dark rows are cut off
    printed = capsys.readouterr().out
    assert "trainA: 3 images with labels, 1 without\n" in printed
    assert "\ntestA: 1 images with labels, 0 without\n" in printed

    partition.write_text("1.png 0\n2.png 0\n")
    with pytest.raises(ValueError, match=r"does not name .*img/3.png and 3 more pictures; write them into it"):
        pack(source, packed, labelling=Labelling(celeba=file, partition=partition), overwrite=True)


def rafd_names(people: range) -> list[str]:
    return [
        f"Rafd{angle:03d}_{person:02d}_Caucasian_female_{emotion}_frontal.jpg"
        for person in people
        for angle in (45, 90)
        for emotion in RAFD_EMOTIONS
    ]


def test_rafd_is_divided_by_people(paths: tuple[Path, Path, Path]) -> None:
    source, packed, _ = paths
    people = {}
    for count in (20, 30):
        write(source, *(f"s/{name}" for name in rafd_names(range(1, count + 1))))
        pack(source, packed, labelling=Labelling(rafd=True), overwrite=True)
        test, train = labels(packed, "testA"), labels(packed, "trainA")
        people[count] = {int(key.split("_")[1]) for key in test}
        assert len(people[count]) == count // 10 and len(test) == 16 * len(people[count])
        assert not people[count] & {int(key.split("_")[1]) for key in train} and len(train) == 16 * count - len(test)
        for key, values in (test | train).items():
            assert values == [int(emotion in key) for emotion in RAFD_EMOTIONS]
    assert len(people[30] & people[20]) >= 1  # who is tested hardly depends on who else is there


def test_rafd_in_folders_stays_as_it_is(paths: tuple[Path, Path, Path]) -> None:
    source, packed, _ = paths
    write(source, *(f"trainA/{name}" for name in rafd_names(range(1, 3))), "testA/" + rafd_names(range(3, 4))[0])
    pack(source, packed, labelling=Labelling(rafd=True))
    assert len(labels(packed, "trainA")) == 32 and len(labels(packed, "testA")) == 1
    write(source, "trainA/other.jpg")
    with pytest.raises(ValueError, match=r"trainA/other.jpg has not the name of a picture of RaFD"):
        pack(source, packed, labelling=Labelling(rafd=True), overwrite=True)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["trainA/x.png", "trainB/y.png"], "holds trainB/, but a data set with labels has one domain, A"),
        (["train/x.png", "test/y.png"], r"holds test/, train/, whose pictures would all be for training; name the"),
        ([], "should hold trainA/ testA/ with images, or images"),
    ],
)
def test_folders_that_are_no_labelled_set_are_refused(
    paths: tuple[Path, Path, Path], names: list[str], sentence: str
) -> None:
    source, packed, file = paths
    source.mkdir()
    write(source, *names)
    with pytest.raises(ValueError, match=sentence):
        pack(source, packed, labelling=table(file, "name,a", "x.png,1"))


def test_pictures_that_cannot_be_read_do_not_shift_the_labels(paths: tuple[Path, Path, Path]) -> None:
    source, packed, file = paths
    write(source, *(f"{name}.png" for name in "wxyz"))
    (source / "x.png").write_bytes(b"nothing")
    [result] = pack(source, packed, labelling=table(file, "n,a", "w.png,0", "x.png,0", "y.png,1", "z.png,0"))
    assert labels(packed, "trainA") == {"w": [0], "y": [1], "z": [0]}
    assert result.labels is not None and result.labels.values.tolist() == [[0], [1], [0]]


def test_packing_twice_gives_the_same_bytes(paths: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, _, file = paths
    write(source, "x.png", "y.jpg")
    labelling = table(file, "n,a,b", "x.png,0,1", "y.jpg,1,")
    for name in "pq":
        pack(source, tmp_path / name, labelling=labelling)
    for name in ("000000.tar", "index.npz"):
        one, two = ((tmp_path / target / "trainA" / name).read_bytes() for target in "pq")
        assert one == two


def test_tables_of_classes_and_attributes(paths: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, packed, file = paths
    rows = ["1,0,1"] * 3 + ["0,0,0"] * 20 + ["0,1,0"] * 2 + ["1,,0", ",,"]
    write(source, *(f"{number:04d}.png" for number in range(len(rows) + 1)))
    table(file, "n,red,big,round", *(f"{number:04d}.png,{row}" for number, row in enumerate(rows)))
    assert main([str(source), str(packed), "--labels-csv", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == [
        "",
        "trainA: 26 images with labels, 2 without, 1 of those with labels in part",
        "attribute  holds  of",
        "red            4  26",
        "big            2  25",
        "round          3  26",
        "class      images",
        "none           20",
        "red+round       3",
        "big             2",
    ]


def test_at_most_32_classes_are_shown() -> None:
    space = LabelSpace([f"a{i}" for i in range(6)])
    values = np.repeat(space.classes, [1000, *range(63, 0, -1)], axis=0).astype(np.int8)
    lines = label_summary("trainA", SampleLabels(space.attributes, values)).splitlines()
    first = lines.index("class           images")
    assert lines[first + 1].split() == ["none", "1,000"] and lines[first + 2].split() == ["a5", "63"]
    assert len(lines) == first + 1 + 32 + 1
    assert lines[-1] == f"and 32 more, with {sum(range(1, 33))} images"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--attributes", "a"], "are for pictures with labels; say where these are with --labels-celeba"),
        (["--partition", "labels.csv"], "are for pictures with labels"),
        (
            ["--labels-csv", "labels.csv", "--partition", "labels.csv"],
            "holds trainA/, and --partition divides a folder",
        ),
        (["--labels-csv", "labels.csv", "--side-by-side"], "leave out --crop and labels, or --side-by-side"),
        (["--labels-csv", "absent.csv"], "No such file or directory: 'absent.csv'"),
        (["--labels-csv", "."], "Is a directory: '.'"),
    ],
)
def test_bad_input_ends_with_a_sentence(
    tmp_path: Path,
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, "source/trainA/x.png")
    table(tmp_path / "labels.csv", "n,a", "x.png,1")
    monkeypatch.chdir(tmp_path)
    assert main(["source", "packed", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_labels_come_from_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["source", "packed", "--labels-rafd", "--labels-csv", "labels.csv"])
    assert "not allowed with argument" in capsys.readouterr().err
