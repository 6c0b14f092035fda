"""Signs that the game between generator and critics has collapsed, measured on what an update makes anyway.

For every field of the generator's outputs that the critics see:

* `FIELD_spread`: how far successive translations are apart (mean absolute difference), relative to successive pictures
  of the domain that they should belong to. 1 is as different as the real ones are, 0 is one output for all inputs.
* `FIELD_change`: how far a translation is from its own source, or from its mirror image where that is nearer, relative
  to how far successive pictures of the source's domain are apart. 0 is the identity.

And for the critics:

* `critic_pull`: the norm of the gradient that reaches a translation by way of the critics, relative to that of all
  losses together (the mean over fields), of the picture that has the least of it. 0 tells the generator nothing: so it
  is where critics have won and are flat around what they reject, and where they say the same of everything.

All are means over the updates in which the generator has trained since they were last asked for; the last one needs no
memory of what was normal once, so that it means the same after a resume.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.method import Gauge, Judge

WARM_UP = 200  # updates since the run's first start before anything is too low
LOWEST_SPREAD, LOWEST_CHANGE, LOWEST_PULL = 0.05, 0.02, 0.01

_SPREAD = (
    "its pictures are nearly the same whatever the input, which training rarely leaves by itself; go back with "
    "--resume to a checkpoint before it, with a lower learning rate of the generator or a higher weight of the terms "
    "that hold on to the input (cycle, PatchNCE, L1)"
)
_CHANGE = (
    "it returns its input nearly unchanged, so that nothing is translated; lower the weight of the terms that hold on "
    "to the input (identity, cycle, PatchNCE) or raise that of the adversarial one, and look whether both domains hold "
    "what they should"
)
_PULL = (
    "the critics hardly move the generator, since they tell real from made too well or not at all; lower the critics' "
    "learning rate or their width, or raise method.lambda_gan, and go on from a checkpoint before it"
)


class Listener:
    """Keeps what an update's generator made, and listens to the gradients that reach it.

    Attributes:
        fakes: By field, what it made of the last micro-batch, `[N, 3, H, W]`, detached; empty before its turn.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = fields
        self.fakes: dict[str, Tensor] = {}
        self._of_critics: dict[int, Tensor] = {}  # by place among the pictures that the critics are given
        self._of_all: dict[str, Tensor] = {}

    def through(self, judge: Judge, outputs: Any) -> Judge:
        """Return a judge that says the same, and of which is heard what it passes back to pictures of that size."""
        fakes: dict[str, Tensor] = {field: getattr(outputs, field) for field in self._fields}
        self.fakes = {field: fake.detach() for field, fake in fakes.items()}
        sizes = {fake.shape[-2:] for fake in fakes.values()}
        for field, fake in fakes.items():
            if fake.requires_grad:
                fake.register_hook(_noting(self._of_all, field))
        places = itertools.count()

        def branch(picture: Tensor) -> Tensor:
            if not picture.requires_grad or picture.shape[-2:] not in sizes:
                return picture
            own = picture.view_as(picture)  # a branch of the graph that only the critics' gradient passes
            own.register_hook(_noting(self._of_critics, next(places)))
            return own

        return lambda *inputs: judge(*(_each_tensor(one, branch) for one in inputs))

    def norms(self) -> tuple[Tensor, Tensor] | None:
        """Return the norms of the critics' gradients [pictures], and the mean one of all losses; None if unheard."""
        if not self._of_critics or not self._of_all:
            return None
        of_critics = [norm for _, norm in sorted(self._of_critics.items())]  # backward comes upon them in any order
        return torch.stack(of_critics), torch.stack(list(self._of_all.values())).mean()


Key = TypeVar("Key")


def _noting(into: dict[Key, Tensor], place: Key) -> Callable[[Tensor], None]:
    def note(gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        into[place] = into[place] + norm if place in into else norm

    return note


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nest of tuples and dicts with all its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_tensor(one, change) for key, one in value.items()}
    if isinstance(value, tuple):
        inner = [_each_tensor(one, change) for one in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return value


class _Domain(NamedTuple):
    """Where the pictures of a batch stand that a field is made from, and those that it should look like."""

    source: str
    target: str


def _domain(batch: Batch | LabelledBatch, field: str) -> _Domain:
    if isinstance(batch, LabelledBatch):
        return _Domain("images", "images")
    return _Domain("b", "a") if field.endswith("_a") else _Domain("a", "b")


class Collapse:
    """Adds up, on the device, what the gauges are made of."""

    def __init__(self) -> None:
        self._warm, self._fakes = False, dict[str, _Domain]()
        self._last: dict[str, Tensor] = {}  # the last picture [1, 3, H, W] of each kind
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(self, number: int, batch: Batch | LabelledBatch, heard: Listener) -> None:
        """Take in an update in which all numbers were finite.

        Args:
            number: Updates made before it, since the run's first start.
            batch: Its last micro-batch.
            heard: What the generator made of that; nothing where it did not train. Fewer fakes than pictures were made
                of the first of every so many.
        """
        if not (fakes := heard.fakes):
            return
        self._warm = number >= WARM_UP
        self._fakes = {field: _domain(batch, field) for field in fakes}
        real = {name: getattr(batch, name) for place in self._fakes.values() for name in place}
        first = not self._last
        for name, pictures in (real | fakes).items():
            with_last = pictures if first else torch.cat([self._last[name], pictures])
            self._last[name] = pictures[-1:].clone()
            if not first:
                self._add(f"{name} apart", F.l1_loss(with_last[1:].float(), with_last[:-1].float()))
        if first:  # of batch 1 there are no two pictures yet
            return
        for field, made in fakes.items():
            source = real[self._fakes[field].source]
            source = source[:: len(source) // len(made)]
            moved = torch.stack([F.l1_loss(made.float(), one) for one in (source, source.flip(-1))]).amin()
            self._add(f"{field} moved", moved)
        if (norms := heard.norms()) is not None:
            self._add("critics", norms[0])
            self._add("all", norms[1])

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def gauges(self) -> dict[str, Gauge]:
        """Return what was measured since the last call; nothing where the generator has not trained."""
        sums, found = self._sums, dict[str, Gauge]()
        for field, domain in self._fakes.items() if sums else ():
            spread = _ratio(sums[f"{field} apart"], sums[f"{domain.target} apart"])
            change = _ratio(sums[f"{field} moved"], sums[f"{domain.source} apart"])
            found[f"{field}_spread"] = Gauge(spread, LOWEST_SPREAD * self._warm, _SPREAD)
            found[f"{field}_change"] = Gauge(change, LOWEST_CHANGE * self._warm, _CHANGE)
        if "all" in sums:
            pull = sums["critics"].min() / sums["all"].clamp_min(torch.finfo(torch.float32).tiny)
            found["critic_pull"] = Gauge(pull, LOWEST_PULL * self._warm, _PULL)
        self._clear()
        return found


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, and 1 where the whole is 0: pictures that are all the same tell nothing."""
    return torch.where(whole > 0, part / whole, torch.ones_like(whole))
