"""The checks of the emulated kernels notice faults: every mutation fails its check, which passes without it."""

from __future__ import annotations

import functools

import pytest

from tests.ops import emulated
from tests.ops.mutations import MUTATIONS, Mutation


@functools.cache
def passes_unmutated(check: str) -> bool:
    return not emulated.caught(emulated.library(emulated.ROOT), check)


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, id=m.name, marks=() if m.quick else pytest.mark.soak) for m in MUTATIONS]
)
def test_a_mutation_is_noticed(mutation: Mutation) -> None:
    assert passes_unmutated(mutation.check)
    mutant = emulated.mutant(mutation.file, mutation.old, mutation.new)
    assert emulated.caught(mutant, mutation.check), f"{mutation.check} passes in spite of: {mutation.name}"


def test_names_are_distinct() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
