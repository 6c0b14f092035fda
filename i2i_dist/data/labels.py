"""Labels of pictures: which combinations are valid, which pictures count as labelled, and in which order they come."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i2i_dist.data.order import SampleOrder
from i2i_dist.draws import generator

MAX_CLASSES = 65_536  # the table of all of them is held in memory
_NAME = re.compile(r"[\w.+-]+( [\w.+-]+)*")  # names become parts of file names, and of A=1,B=0
_Labels = npt.NDArray[np.uint8]
_Ints = npt.NDArray[np.int64]


class SampleLabels(NamedTuple):
    """What is known of the samples of a source.

    Attributes:
        attributes: Their names.
        values: int8 `[samples, attributes]`: 1, 0, or -1 where it is not known.
    """

    attributes: tuple[str, ...]
    values: npt.NDArray[np.int8]


class LabelSpace:
    """Attributes that are there or not, and the combinations of them that are valid: the classes.

    Attributes:
        attributes: Names of the L attributes.
        classes: uint8 `[K, L]`, the valid labels, as 0 and 1; in the order of a Cartesian product, the last attribute
            fastest.
        choices: For each group of attributes of which exactly one holds, their places.
        free: Places of all other attributes.
        rules: What makes a label valid, in words, for messages.
    """

    def __init__(
        self,
        attributes: Sequence[str],
        at_most_one: Sequence[Sequence[str]] = (),
        exactly_one: Sequence[Sequence[str]] = (),
    ) -> None:
        """List the classes.

        Args:
            attributes: Names, each once.
            at_most_one: Groups of attributes that exclude one another, such as colours of hair.
            exactly_one: Groups of attributes of which each picture has one, such as emotions.

        Raises:
            ValueError: A name is not usable or not known, groups overlap, or there are too many classes.
        """
        self.attributes = tuple(attributes)
        check_names(self.attributes, [*at_most_one, *exactly_one])
        places = {name: place for place, name in enumerate(self.attributes)}
        exclusive = [[places[name] for name in group] for group in at_most_one]
        self.choices = [[places[name] for name in group] for group in exactly_one]
        chosen = {place for group in self.choices for place in group}
        self.free = [place for place in range(len(self.attributes)) if place not in chosen]
        self.classes = _classes(len(self.attributes), exclusive, self.choices)
        self._groups = [("at most one", group) for group in exclusive]
        self._groups += [("exactly one", group) for group in self.choices]
        self.rules = [f"{how_many} of {', '.join(self._named(group))}" for how_many, group in self._groups]
        self._bits = 1 << np.arange(len(self.attributes), dtype=np.int64)
        codes = self.classes @ self._bits
        self._order: _Ints = np.argsort(codes)
        self._codes: _Ints = codes[self._order]

    def numbers(self, labels: npt.NDArray[np.integer]) -> _Ints:
        """Return the class of each label, int64 `[N]` for `[N, L]` of 0 and 1; -1 for one that is not valid."""
        codes = labels.astype(np.int64) @ self._bits
        nearest = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[nearest] == codes, self._order[nearest], -1)

    def parse(self, text: str) -> _Labels:
        """Read a label, uint8 `[L]`, as people write it: "A=1,B=0"; attributes that are not named are 0.

        Raises:
            ValueError: That is no valid label; the message says what is allowed.
        """
        given: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in self.attributes:
                nearest = difflib.get_close_matches(name, self.attributes, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
                raise ValueError(f"no attribute is called '{name}'; allowed is {', '.join(self.attributes)}{hint}")
            if value not in ("0", "1"):
                raise ValueError(f"given '{part.strip()}', allowed is {name}=0 or {name}=1")
            if name in given:
                raise ValueError(f"{name} stands twice; leave it once")
            given[name] = int(value)
        label: _Labels = np.array([given.get(name, 0) for name in self.attributes], dtype=np.uint8)
        for (how_many, group), rule in zip(self._groups, self.rules, strict=True):
            holds = [place for place in group if label[place]]
            if len(holds) > 1 or (how_many == "exactly one" and not holds):
                named = f"1 for {', '.join(self._named(holds))}" if holds else "1 for none of them"
                raise ValueError(f"given {named}; allowed is {rule}")
        return label

    def __str__(self) -> str:
        rules = f" ({'; '.join(self.rules)})" if self.rules else ""
        return ", ".join(self.attributes) + rules

    def _named(self, places: Sequence[int]) -> list[str]:
        return [self.attributes[place] for place in places]

    def text(self, label: Sequence[int]) -> str:
        """Name a label by the attributes that hold, "A+B", or "none"."""
        return label_text(self.attributes, label)


def label_text(attributes: Sequence[str], label: Sequence[int]) -> str:
    """Name a label by the attributes that hold, "A+B", or "none"."""
    return "+".join(name for name, holds in zip(attributes, label, strict=True) if holds) or "none"


def check_names(attributes: Sequence[str], groups: Sequence[Sequence[str]] = ()) -> None:
    """Refuse names of attributes, and groups of them, that a label space cannot have; raises ValueError."""
    if not attributes:
        raise ValueError("attributes is empty; at least one is needed")
    if len(attributes) > 62:
        raise ValueError(f"{len(attributes)} attributes are given, allowed are at most 62; choose those to be edited")
    for name in attributes:
        if not _NAME.fullmatch(name) or name in ("all", "none"):
            raise ValueError(
                f"the attribute {name!r} cannot be written in labels and file names; allowed are letters, digits and "
                "_ . + - with single blanks between them, and neither 'all' nor 'none'"
            )
    grouped = [name for group in groups for name in group]
    for name in grouped:
        if name not in attributes:
            raise ValueError(f"a group names {name!r}, which is not among the attributes {', '.join(attributes)}")
    for names, what in ((attributes, "attributes"), (grouped, "groups")):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands twice in the {what}; leave it once")
    if any(len(group) < 2 for group in groups):
        raise ValueError("a group of attributes that exclude one another has at least two")


def _classes(attributes: int, at_most_one: Sequence[Sequence[int]], exactly_one: Sequence[Sequence[int]]) -> _Labels:
    """Extend the valid beginnings of labels by one attribute after the other, so that what is not valid never grows."""
    table = np.zeros((1, 0), dtype=np.uint8)
    for place in range(attributes):
        rows = np.repeat(table, 2, axis=0)
        table = np.column_stack([rows, np.tile([0, 1], len(table)).astype(np.uint8)])
        for group in (*at_most_one, *exactly_one):
            if place in group:
                holds = table[:, [member for member in group if member <= place]].sum(axis=1)
                complete = place == max(group) and group in exactly_one
                table = table[(holds <= 1) & ((holds == 1) | (not complete))]
        if len(table) > MAX_CLASSES:
            raise ValueError(
                f"the attributes have more than {MAX_CLASSES} valid combinations; choose fewer, or name the groups "
                "that exclude one another"
            )
    return table


def labelled_subset(classes: _Ints, fraction: float, seed: int) -> _Ints:
    """Choose the samples whose labels a method is told: by turns one of each class, until there are enough.

    Args:
        classes: int64 `[N]`, the class of each sample; negative for those that have no valid label.
        fraction: How many, as a share in (0, 1] of those with a valid label; rounded up.
        seed: The run's seed. A smaller fraction is a part of a greater one.

    Returns:
        int64, sorted. All classes have equally many, but for the last turn and for those that have no more.
    """
    rank = np.zeros(len(classes), dtype=np.int64)
    for number in np.unique(classes[classes >= 0]):
        members = np.flatnonzero(classes == number)
        rank[members] = generator(seed, "labelled_subset", int(number)).permutation(len(members))
    valid = np.flatnonzero(classes >= 0)
    by_turns = valid[np.lexsort((classes[valid], rank[valid]))]
    count = math.ceil(len(valid) * Fraction(str(fraction)))  # in floating point 0.07 of 100 would be more than 7
    chosen: _Ints = np.sort(by_turns[:count])
    return chosen


class _Part:
    """Part of a source's samples, shuffled."""

    def __init__(self, members: _Ints, seed: int, name: str) -> None:
        self._members, self._order = members, SampleOrder([len(members)], seed, name)

    def sample(self, place: int) -> int:
        return int(self._members[self._order.sample(place)])

    def substitute(self, place: int, rng: np.random.Generator) -> int:
        return int(rng.choice(self._members))


class _ClassGroups:
    """Groups of k classes with m samples of each, class after class.

    A group's classes are drawn without replacement from those that have samples, and so are the samples of a class;
    one that has fewer than m gives some of them again.
    """

    def __init__(self, classes: _Ints, members: _Ints, shape: tuple[int, int], seed: int) -> None:
        self._shape, self._seed = shape, seed
        self._members = {int(number): members[classes[members] == number] for number in np.unique(classes[members])}
        self._group = lru_cache(maxsize=8)(self._build_group)

    def sample(self, place: int) -> int:
        return self._group(place // (self._shape[0] * self._shape[1]))[1][place % (self._shape[0] * self._shape[1])]

    def substitute(self, place: int, rng: np.random.Generator) -> int:
        count, each = self._shape
        chosen = self._group(place // (count * each))[0]
        return int(rng.choice(self._members[chosen[place % (count * each) // each]]))

    def _build_group(self, number: int) -> tuple[list[int], list[int]]:
        count, each = self._shape
        rng = generator(self._seed, "labelled_group", number)
        chosen = [int(one) for one in rng.choice(list(self._members), size=count, replace=False)]
        return chosen, [int(one) for cls in chosen for one in np.resize(rng.permutation(self._members[cls]), each)]


class LabelledSet:
    """A source's samples as a method with labels sees them.

    Attributes:
        counts: How many samples are labelled; not told, or without labels; and left out, since theirs are not valid.
    """

    def __init__(
        self, known: SampleLabels, space: LabelSpace, fraction: float, group: tuple[int, int] | None, seed: int
    ) -> None:
        """Divide the samples.

        Args:
            known: Their labels.
            space: Which of them count. A sample of which one of its attributes is not known has no label.
            fraction: See `labelled_subset`.
            group: How many classes, and samples of each, make a group; None for samples one by one.
            seed: The run's seed.

        Raises:
            ValueError: An attribute is not among the labels, or there are too few labelled samples.
        """
        columns = _columns(known.attributes, space.attributes)
        values = known.values[:, columns]
        told = (values >= 0).all(axis=1)
        self._values: _Labels = np.maximum(values, 0).astype(np.uint8)
        classes = np.where(told, space.numbers(self._values), -1)
        self._labelled = labelled_subset(classes, fraction, seed)
        valid = told & (classes >= 0)
        valid[self._labelled] = False
        self._unlabelled = np.flatnonzero(valid | ~told)
        left_out = len(classes) - len(self._labelled) - len(self._unlabelled)
        self.counts = (len(self._labelled), len(self._unlabelled), left_out)
        present = len(np.unique(classes[self._labelled]))
        if present < (group[0] if group else 1):
            raise ValueError(
                f"{len(self._labelled)} pictures with labels are of {present} classes, and a group needs "
                f"{group[0] if group else 1}; label more of them, or ask for groups of fewer classes"
            )
        self._classes, self._group, self._seed = classes, group, seed

    def order(self, stream: str) -> _Part | _ClassGroups:
        """Return the order in which a stream, "labelled" or "unlabelled", visits its samples.

        Raises:
            ValueError: It has none.
        """
        if stream == "unlabelled":
            if not len(self._unlabelled):
                raise ValueError(
                    f"all {len(self._labelled)} pictures are labelled, so that none is left for the updates without "
                    "labels; lower method.labelled_fraction, or set it to 1 and method.unlabelled_turns to false"
                )
            return _Part(self._unlabelled, self._seed, "unlabelled")
        if self._group is None:
            return _Part(self._labelled, self._seed, "labelled")
        return _ClassGroups(self._classes, self._labelled, self._group, self._seed)

    def label(self, sample: int) -> _Labels:
        """Return a sample's label, uint8 `[L]`."""
        label: _Labels = self._values[sample]
        return label

    def another(self, position: int) -> _Labels:
        """Return the label of a labelled sample that is drawn for a global position, all with equal probability."""
        rng = generator(self._seed, "label_of_another", position)
        return self.label(int(rng.choice(self._labelled)))


def _columns(there: Sequence[str], wanted: Sequence[str]) -> list[int]:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(
            f"the pictures' labels say nothing of {', '.join(missing)}; they have {', '.join(there)}. Name some of "
            "these in method.attributes"
        )
    return [there.index(name) for name in wanted]
