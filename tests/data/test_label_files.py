"""Files of labels are read, and what is wrong in one is named with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from i2i_dist.data.label_files import RAFD_EMOTIONS, read_celeba, read_csv, read_partition, read_rafd

CELEBA = "3\nBlack_Hair Male  Young \n1.jpg -1  1  1\n2.jpg  1 -1 -1 \n\n3.jpg -1 -1  1\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels.txt"


def test_celebas_list(file: Path) -> None:
    file.write_text(CELEBA)
    rows, labels = read_celeba(file)
    assert rows == (file, ["1.jpg", "2.jpg", "3.jpg"], [3, 4, 6])
    assert labels.attributes == ("Black_Hair", "Male", "Young") and labels.values.dtype == np.int8
    assert labels.values.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 1]]


def test_matchgans_own_lists(file: Path) -> None:
    file.write_text("3\nMale Young\n1.jpg -1 1 0 3\n2.jpg 1 1 1 None\n3.jpg 1 -1 2 None\n")
    rows, labels = read_celeba(file)
    assert rows.names == ["1.jpg", "2.jpg", "3.jpg"] and labels.attributes == ("Male", "Young")
    assert labels.values.tolist() == [[0, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "holds '', and the number of pictures is expected"),
        ("Male Young\n1.jpg 1 1\n", 1, "holds 'Male Young', and the number of pictures is expected"),
        ("1\n", 2, "should name the attributes, and names none"),
        ("1\nMale Young Male\n1.jpg 1 1 1\n", 2, "names Male twice"),
        ("2\nMale Young\n1.jpg 1 1\n2.jpg 1\n", 4, "holds 1 values for 2 attributes"),
        ("2\nMale Young\n1.jpg 1 1\n2.jpg 1 1 -1\n", 4, "holds 3 values for 2 attributes"),
        ("2\nMale\n1.jpg 1 1 1\n2.jpg 1 -1 1\n", 4, "holds 3 values for 1 attributes"),  # two headings are missing
        ("2\nMale Young\n\n1.jpg 1 1\n2.jpg 1 0\n", 5, "holds the value '0'; allowed are 1 and -1"),
        ("2\nMale Young\n1.jpg 1 1\n1.jpg 1 -1\n", 4, "names '1.jpg', as line 3 does; leave one of them"),
        (CELEBA + "4.jpg 1 1 1\n", 1, "says that there are 3 pictures, but 4 rows follow"),
        (CELEBA[:-16], 1, "says that there are 3 pictures, but 2 rows follow"),
    ],
)
def test_what_is_no_list_of_celeba_is_refused(file: Path, text: str, line: int, reason: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_celeba(file)
    assert str(caught.value) == f"{file}, line {line}, {reason}."


def test_a_table(file: Path) -> None:
    file.write_text('\ufeffpicture, big ,"a, b",x\n ./one.png,1, 0 ,\n\n"with, comma.png",0,,1\n\n', encoding="utf-8")
    rows, labels = read_csv(file)
    assert rows == (file, ["one.png", "with, comma.png"], [2, 4])
    assert labels.attributes == ("big", "a, b", "x") and labels.values.dtype == np.int8
    assert labels.values.tolist() == [[1, 0, -1], [0, -1, 1]]


def test_a_table_of_minus_ones(file: Path) -> None:
    file.write_text("image_id,Male,Young\r\n1.jpg,-1,1\r\n2.jpg,,-1\r\n")
    assert read_csv(file)[1].values.tolist() == [[0, 1], [-1, 0]]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "is empty, and a row of headings is expected"),
        ("picture\n1.png\n", 1, "should name the attributes, and names none"),
        ("1.png,1,0\n2.png,0,1\n", 1, "holds the values 1, 0, and a row of headings is expected"),
        ("picture;a\n1.png;1\n", 1, "should name the attributes, and names none"),
        ("picture,a,,b\n1.png,1,0,1\n", 1, "has no heading for the column 3"),
        ("picture,a,b,a\n1.png,1,0,1\n", 1, "names a twice"),
        ("picture,a,b\n1.png,1,0\n2.png,1\n", 3, "holds 1 values for 2 attributes"),
        ("picture,a,b\n1.png,1,0,0\n", 2, "holds 3 values for 2 attributes"),
        ("picture,a,b\n\n1.png,1,2\n", 3, "gives b the value '2'; allowed are 1, 0 or -1, and nothing"),
        ("picture,a\n1.png,true\n", 2, "gives a the value 'true'; allowed are 1, 0 or -1, and nothing"),
        ("picture,a\n1.png,1\n./1.png,0\n", 3, "names '1.png', as line 2 does; leave one of them"),
        (
            "picture,a,b\n1.png,1,0\n2.png,0,1\n3.png,1,-1\n",
            4,
            "brings 0 beside -1; write 0 for what does not hold, and nothing for what is not known",
        ),
    ],
)
def test_what_is_no_table_is_refused(file: Path, text: str, line: int, reason: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_csv(file)
    assert str(caught.value) == f"{file}, line {line}, {reason}."


@pytest.mark.parametrize("content", [b"picture,a\n\xff\xfe.png,1\n", b'picture,a\n"1.png,1\n'])
def test_a_table_that_cannot_be_read_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not a table of comma-separated values in UTF-8"):
        read_csv(file)


def test_lists_that_are_no_text_are_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    for read in (read_celeba, read_partition):
        with pytest.raises(ValueError, match="is not a text in UTF-8"):
            read(file)


def test_a_partition(file: Path) -> None:
    file.write_text("1.jpg 0\n2.jpg  1 \n\n3.jpg 2\n")
    rows, parts = read_partition(file)
    assert rows == (file, ["1.jpg", "2.jpg", "3.jpg"], [1, 2, 4]) and parts == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("1.jpg 0\n2.jpg 3\n", 2, "holds '2.jpg 3'; expected are a name and 0, 1 or 2 (train, val, test)"),
        ("1.jpg 0\n2.jpg\n", 2, "holds '2.jpg'; expected are a name and 0, 1 or 2 (train, val, test)"),
        ("image_id,partition\n", 1, "holds 'image_id,partition'; expected are a name and 0, 1 or 2 (train, val, test)"),
        ("1.jpg 0\n2.jpg 0\n1.jpg 2\n", 3, "names '1.jpg', as line 1 does; leave one of them"),
    ],
)
def test_what_is_no_partition_is_refused(file: Path, text: str, line: int, reason: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_partition(file)
    assert str(caught.value) == f"{file}, line {line}, {reason}."


def test_names_of_rafd() -> None:
    assert len(RAFD_EMOTIONS) == 8 and list(RAFD_EMOTIONS) == sorted(RAFD_EMOTIONS)
    assert read_rafd(Path("a/Rafd090_01_Caucasian_female_angry_frontal.jpg")) == (1, "angry")
    assert read_rafd(Path("Rafd045_73_Moroccan_male_contemptuous_left.png")) == (73, "contemptuous")
    assert read_rafd(Path("Rafd180_10_Kid_male_surprised_right.jpg")) == (10, "surprised")


@pytest.mark.parametrize(
    "name",
    [
        "000001.jpg",
        "Rafd090_01_Caucasian_female_bored_frontal.jpg",
        "Rafd090_Caucasian_female_angry_frontal.jpg",
        "Rafd090_01_Caucasian_female_angry.jpg",
        "Copy of Rafd090_01_Caucasian_female_angry_frontal.jpg",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has not the name of a picture of RaFD, such as") as caught:
        read_rafd(Path(name))
    assert str(caught.value).startswith(name)
