"""Which labels are valid, which pictures count as labelled, and in which order they come."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from i2i_dist.data.labels import LabelledSet, LabelSpace, SampleLabels, labelled_subset

HAIR = ["Black_Hair", "Blond_Hair", "Brown_Hair"]
CELEBA = LabelSpace([*HAIR, "Male", "Young"], at_most_one=[HAIR])
EMOTIONS = ["angry", "contemptuous", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]
SIZES = [40, 3, 21, 1, 12]  # members of each class of CLASSES
CLASSES = np.random.default_rng(0).permutation(np.repeat(np.arange(-1, 4), SIZES))  # -1 for what is not valid


def test_celebas_five_attributes_have_sixteen_classes() -> None:
    valid = [label for label in itertools.product([0, 1], repeat=5) if sum(label[:3]) <= 1]
    assert len(valid) == 16
    assert [tuple(row) for row in CELEBA.classes.tolist()] == valid
    assert CELEBA.classes.dtype == np.uint8 and CELEBA.classes.shape == (16, 5)
    assert CELEBA.choices == [] and CELEBA.free == [0, 1, 2, 3, 4]


def test_numbers_are_the_rows_of_the_table() -> None:
    everything = np.array(list(itertools.product([0, 1], repeat=5)), dtype=np.int8)
    numbers = CELEBA.numbers(everything)
    assert numbers.dtype == np.int64
    for label, number in zip(everything, numbers, strict=True):
        if label[:3].sum() > 1:  # two colours of hair
            assert number == -1
        else:
            assert (CELEBA.classes[number] == label).all()
    assert sorted(numbers[numbers >= 0]) == list(range(16))
    assert CELEBA.numbers(np.zeros((0, 5), dtype=np.uint8)).shape == (0,)


def test_of_eight_emotions_one_holds() -> None:
    space = LabelSpace(EMOTIONS, exactly_one=[EMOTIONS])
    assert (space.classes == np.eye(8, dtype=np.uint8)[::-1]).all()  # the last attribute counts first
    assert space.choices == [list(range(8))] and space.free == []
    assert space.numbers(np.array([[0] * 8, [1] + [0] * 7, [1, 1] + [0] * 6])).tolist() == [-1, 7, -1]


def test_groups_need_not_be_neighbours() -> None:
    space = LabelSpace(
        ["red", "big", "blue", "hat", "wig"], at_most_one=[["wig", "hat"]], exactly_one=[["blue", "red"]]
    )
    valid = [x for x in itertools.product([0, 1], repeat=5) if x[0] + x[2] == 1 and x[3] + x[4] <= 1]
    assert [tuple(row) for row in space.classes.tolist()] == valid
    assert space.choices == [[2, 0]] and space.free == [1, 3, 4]


def test_labels_are_named_by_what_holds() -> None:
    assert CELEBA.text([0, 1, 0, 0, 1]) == "Blond_Hair+Young" and CELEBA.text([0] * 5) == "none"


@pytest.mark.parametrize(
    ("attributes", "at_most", "exactly", "sentence"),
    [
        ([], [], [], "attributes is empty; at least one is needed"),
        (["a,b"], [], [], "'a,b' cannot be written in labels and file names"),
        (["a=1"], [], [], "'a=1' cannot be written"),
        (["a/b"], [], [], "'a/b' cannot be written"),
        ([""], [], [], "'' cannot be written"),
        ([" a"], [], [], "' a' cannot be written"),
        (["a  b"], [], [], "single blanks between them"),
        (["all"], [], [], "neither 'all' nor 'none'"),
        (["a", "b", "a"], [], [], "a stands twice in the attributes; leave it once"),
        (["a", "b"], [["a", "c"]], [], "a group names 'c', which is not among the attributes a, b"),
        (["a", "b", "c"], [["a", "b"]], [["b", "c"]], "b stands twice in the groups; leave it once"),
        (["a", "b"], [["a", "a"]], [], "a stands twice in the groups"),
        (["a", "b"], [["a"]], [], "has at least two"),
        ([f"a{i}" for i in range(63)], [], [], "63 attributes are given, allowed are at most 62"),
        ([f"a{i}" for i in range(40)], [], [], "more than 65536 valid combinations; choose fewer, or name the groups"),
    ],
)
def test_what_is_no_label_space_is_refused(
    attributes: list[str], at_most: list[list[str]], exactly: list[list[str]], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        LabelSpace(attributes, at_most, exactly)
    assert sentence in str(caught.value)


def test_the_largest_spaces() -> None:
    assert len(LabelSpace([f"a{i}" for i in range(16)]).classes) == 65_536
    names = [f"a{i}" for i in range(62)]
    space = LabelSpace(names, exactly_one=[names])  # codes of 62 bits
    assert space.numbers(space.classes).tolist() == list(range(62))


def counts(chosen: np.ndarray, classes: np.ndarray = CLASSES) -> list[int]:
    found = Counter(classes[chosen].tolist())
    return [found[number] for number in range(4)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_the_labelled_subset_is_balanced_until_rare_classes_run_out(fraction: float) -> None:
    chosen = labelled_subset(CLASSES, fraction, seed=3)
    assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
    assert len(chosen) == math.ceil(sum(SIZES[1:]) * fraction)
    found = counts(chosen)
    left = [size - count for size, count in zip(SIZES[1:], found, strict=True)]
    most = max(found)
    # A class lags by more than the last turn's one only when all of it is chosen.
    assert all(most - count <= 1 or not rest for count, rest in zip(found, left, strict=True))


def test_growing_fractions_are_nested() -> None:
    previous: set[int] = set()
    for percent in range(1, 101):
        chosen = set(labelled_subset(CLASSES, percent / 100, seed=3).tolist())
        assert previous <= chosen
        previous = chosen
    assert previous == set(np.flatnonzero(CLASSES >= 0).tolist())


def test_the_share_is_rounded_up_but_not_by_floating_point() -> None:
    classes = np.zeros(100, dtype=np.int64)
    assert [len(labelled_subset(classes, fraction, 0)) for fraction in (0.07, 0.29, 0.57, 1e-5)] == [7, 29, 57, 1]


def test_the_seed_alone_decides_which_ones() -> None:
    one, same, other = (labelled_subset(CLASSES, 0.5, seed) for seed in (3, 3, 4))
    assert (one == same).all() and one.tolist() != other.tolist()
    assert counts(one) == counts(other)
    apart = labelled_subset(CLASSES, 0.5, 3).tolist()
    assert apart != np.flatnonzero(CLASSES >= 0)[: len(apart)].tolist()


def known(classes: np.ndarray, space: LabelSpace = CELEBA) -> SampleLabels:
    """Labels of these classes, among attributes of which the space knows nothing; -1 unknown, -2 two hair colours."""
    rows = {-1: [-1] * 5, -2: [1, 1, 0, 0, 1]}
    wanted = np.array([rows.get(number, space.classes[number].tolist()) for number in classes.tolist()], dtype=np.int8)
    columns = [wanted[:, 4], np.full(len(wanted), -1), *wanted[:, :4].T]
    return SampleLabels(("Young", "Bald", *HAIR, "Male"), np.stack(columns, axis=1).astype(np.int8))


def test_samples_are_divided_into_labelled_unlabelled_and_left_out() -> None:
    classes = np.repeat([-2, -1, 0, 7, 15], [3, 4, 6, 6, 6])
    samples = known(classes)
    samples.values[12, 5] = -1  # Male is not known of one, which then has no label
    labelled = LabelledSet(samples, CELEBA, 0.5, None, seed=1)
    assert labelled.counts == (9, 13, 3)
    visited = {
        stream: [labelled.order(stream).sample(place) for place in range(count)]
        for stream, count in (("labelled", 9), ("unlabelled", 13))
    }
    assert Counter(classes[visited["labelled"]].tolist()) == {0: 3, 7: 3, 15: 3}
    assert set(visited["unlabelled"]) == set(range(3, 25)) - set(visited["labelled"])
    for sample in visited["labelled"]:
        assert labelled.label(sample).tolist() == CELEBA.classes[classes[sample]].tolist()
        assert labelled.label(sample).dtype == np.uint8


def test_all_labels_are_told() -> None:
    labelled = LabelledSet(known(np.arange(16)), CELEBA, 1.0, None, seed=1)
    assert labelled.counts == (16, 0, 0)
    with pytest.raises(ValueError, match="none is left for the updates without labels"):
        labelled.order("unlabelled")
    with_unknown = LabelledSet(known(np.arange(-1, 16)), CELEBA, 1.0, None, seed=1)
    assert with_unknown.counts == (16, 1, 0) and with_unknown.order("unlabelled").sample(5) == 0


def test_groups_are_of_distinct_classes_with_some_of_each() -> None:
    classes = np.random.default_rng(1).permutation(np.repeat(np.arange(16), 9))
    order = LabelledSet(known(classes), CELEBA, 1.0, (4, 4), seed=1).order("labelled")
    drawn = np.array([order.sample(place) for place in range(16 * 400)]).reshape(400, 4, 4)
    of = classes[drawn]  # [groups, classes, images]
    assert (of == of[..., :1]).all()
    assert all(len(set(group)) == 4 for group in of[..., 0].tolist())
    assert all(len(set(images)) == 4 for images in drawn.reshape(-1, 4).tolist())
    often = np.bincount(of[..., 0].ravel(), minlength=16)  # of 1600, expected are 100 of each
    assert often.min() > 65 and often.max() < 140
    assert set(drawn.ravel().tolist()) == set(range(len(classes)))
    again = LabelledSet(known(classes), CELEBA, 1.0, (4, 4), seed=1).order("labelled")
    assert [again.sample(place) for place in (6399, 0, 17)] == [drawn.ravel()[place] for place in (6399, 0, 17)]


def test_classes_with_few_images_give_them_again() -> None:
    classes = np.repeat([0, 5, 9], [1, 3, 8])
    order = LabelledSet(known(classes), CELEBA, 1.0, (2, 4), seed=1).order("labelled")
    for group in range(60):
        samples = [order.sample(8 * group + place) for place in range(8)]
        for images in (samples[:4], samples[4:]):
            [number] = set(classes[images].tolist())
            assert len(set(images)) == {0: 1, 5: 3, 9: 4}[number]


@pytest.mark.parametrize("group", [None, (2, 4)])
def test_a_substitute_is_of_the_same_stream_and_class(group: tuple[int, int] | None) -> None:
    classes = np.repeat([0, 5, 9], 8)
    labelled = LabelledSet(known(classes), CELEBA, 0.5, group, seed=1)
    order, rng = labelled.order("labelled"), np.random.default_rng(0)
    told = set(labelled_subset(classes, 0.5, 1).tolist())
    for place in range(40):
        substitutes = [order.substitute(place, rng) for _ in range(200)]
        if group is None:
            assert set(substitutes) == told
        else:
            expected = {sample for sample in told if classes[sample] == classes[order.sample(place)]}
            assert set(substitutes) == expected
    unlabelled = labelled.order("unlabelled")
    assert {unlabelled.substitute(0, rng) for _ in range(200)} == set(range(24)) - told


def test_labels_of_another_are_as_frequent_as_they_are() -> None:
    classes = np.repeat([0, 5, 9], [10, 30, 60])
    labelled = LabelledSet(known(classes), CELEBA, 1.0, None, seed=1)
    drawn = CELEBA.numbers(np.stack([labelled.another(position) for position in range(3000)]))
    found = np.bincount(drawn, minlength=16)[[0, 5, 9]] / 3000
    np.testing.assert_allclose(found, [0.1, 0.3, 0.6], atol=0.03)
    assert (labelled.another(17) == labelled.another(17)).all()


@pytest.mark.parametrize(
    ("classes", "group", "sentence"),
    [
        ([0, 0, 5, 5], (4, 4), "4 pictures with labels are of 2 classes, and a group needs 4; label more of them"),
        ([-1, -2], None, "0 pictures with labels are of 0 classes, and a group needs 1"),
    ],
)
def test_too_few_classes_are_refused(classes: list[int], group: tuple[int, int] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LabelledSet(known(np.array(classes)), CELEBA, 1.0, group, seed=1)


def test_attributes_that_the_pictures_do_not_have_are_named() -> None:
    with pytest.raises(ValueError, match=r"say nothing of Smiling; they have Young, Bald, .*Name some of these"):
        LabelledSet(known(np.arange(16)), LabelSpace(["Male", "Smiling"]), 1.0, None, seed=1)
