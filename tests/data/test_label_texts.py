"""Labels as people write them: what is not said is 0, and what is not valid is told with what is."""

from __future__ import annotations

import pytest

from i2i_dist.data.labels import LabelSpace

FACES = LabelSpace(
    ["Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"],
    at_most_one=[["Black_Hair", "Blond_Hair", "Brown_Hair"]],
)
MOODS = LabelSpace(["light hair", "angry", "happy", "sad"], exactly_one=[["angry", "happy", "sad"]])


@pytest.mark.parametrize(
    ("space", "text", "label"),
    [
        (FACES, "Blond_Hair=1,Male=0", [0, 1, 0, 0, 0]),
        (FACES, "Young=1,Black_Hair=1", [1, 0, 0, 0, 1]),
        (FACES, "Male=0", [0, 0, 0, 0, 0]),
        (MOODS, "happy=1", [0, 0, 1, 0]),
        (MOODS, "light hair=1, sad = 1,angry=0", [1, 0, 0, 1]),
    ],
)
def test_attributes_that_are_not_named_are_0(space: LabelSpace, text: str, label: list[int]) -> None:
    parsed = space.parse(text)
    assert parsed.dtype == "uint8" and parsed.tolist() == label


@pytest.mark.parametrize("space", [FACES, MOODS])
def test_every_class_can_be_written(space: LabelSpace) -> None:
    for label in space.classes:
        written = ",".join(f"{name}={value}" for name, value in zip(space.attributes, label, strict=True))
        assert space.parse(written).tolist() == label.tolist()


@pytest.mark.parametrize(
    ("space", "text", "words"),
    [
        (FACES, "Blond_hair=1", "no attribute is called 'Blond_hair'; allowed is .*; did you mean 'Blond_Hair'\\?$"),
        (FACES, "xyz=1", "no attribute is called 'xyz'; allowed is Black_Hair, Blond_Hair, Brown_Hair, Male, Young$"),
        (FACES, "", "no attribute is called ''"),
        (FACES, "Male=1,", "no attribute is called ''"),
        (FACES, "none", "no attribute is called 'none'"),
        (FACES, "Male", "given 'Male', allowed is Male=0 or Male=1$"),
        (FACES, "Male=-1", "given 'Male=-1', allowed is Male=0 or Male=1$"),
        (FACES, "Male=1=0", "given 'Male=1=0', allowed is"),
        (FACES, "Male=1,Young=0,Male=1", "Male stands twice; leave it once$"),
        (FACES, "Brown_Hair=1,Black_Hair=1", "given 1 for Black_Hair, Brown_Hair; allowed is at most one of Bla"),
        (MOODS, "light hair=1", "given 1 for none of them; allowed is exactly one of angry, happy, sad$"),
        (MOODS, "sad=1,happy=1", "given 1 for happy, sad; allowed is exactly one of angry, happy, sad$"),
    ],
)  # fmt: skip
def test_what_is_no_label_is_told_with_what_is(space: LabelSpace, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        space.parse(text)


def test_rules_are_told_in_words() -> None:
    space = LabelSpace("abcde", at_most_one=["ab"], exactly_one=["cd"])
    assert space.rules == ["at most one of a, b", "exactly one of c, d"]
    assert LabelSpace("ab").rules == []
