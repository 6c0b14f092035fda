"""Signs that the game between generator and critics has collapsed, measured on what an update makes anyway.

For every field of the generator's outputs that the critics see:

* `FIELD_spread`: how far successive translations are apart (mean absolute difference), relative to successive pictures
  of the domain that they should belong to. 1 is as different as the real ones are, 0 is one output for all inputs.
* `FIELD_change`: how far a translation is from its own source, or from its mirror image where that is nearer, relative
  to how far successive pictures of the source's domain are apart. 0 is the identity.

And for the critics. A slope is the norm of a gradient times the root of its number of values: by how much a loss would
change, to first order, if all those values moved by 1.

* `critic_pull`: the slope at a translation of the losses behind the critics, of the translation with the least. 0 tells
  the generator nothing: the critics are flat around it, or say the same of everything.
* `critic_doubt`: the slope of the critics' losses at what they say of real and made pictures, the mean over all maps of
  verdicts. 0 leaves them nothing to learn: they tell all real pictures from all that are made.

Adversarial losses of all kinds ask for verdicts that differ by about 1, and pictures are in [-1, 1], so slopes have no
scale of their own; the weight of a loss is part of them. All are means over what was measured since they were last
asked for: every fourth update in which the generator trains. None needs a memory of what was normal once, so that they
mean the same after a resume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.method import Gauge, Judge

WARM_UP = 200  # updates since the run's first start before anything is too low
EVERY = 4  # of so many updates of the generator one is measured, which then costs nothing worth measuring
LOWEST_SPREAD, LOWEST_CHANGE = 0.05, 0.02

_SPREAD = (
    "its pictures are nearly the same whatever the input, which training rarely leaves by itself; go back with "
    "--resume to a checkpoint before it, with a lower method.lr or a higher weight of the terms that hold on to the "
    "input (cycle, PatchNCE, L1)"
)
_CHANGE = (
    "it returns its input nearly unchanged, so that nothing is translated; lower the weight of the terms that hold on "
    "to the input (identity, cycle, PatchNCE) or raise that of the adversarial one, and look whether both domains hold "
    "what they should"
)
_OF_CRITICS = {
    "critic_pull": (
        0.05,
        "the critics hardly move the generator, which then follows its other losses alone; go back with --resume to a "
        "checkpoint before it, with a lower method.lr, or with less weight on the other losses",
    ),
    "critic_doubt": (
        0.01,
        "the critics tell every real picture from every one that is made, and learn no more; see that both "
        "domains are what they should be and that there are enough pictures, lower the weight of the generator's other "
        "losses, or start again with narrower critics (method.critic_width)",
    ),
}


class Listener:
    """Keeps what an update's generator made, and listens to gradients that pass between it and the critics.

    Attributes:
        fakes: By field, what it made of the last micro-batch, `[N, 3, H, W]`, detached; empty before its turn.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = fields
        self.fakes: dict[str, Tensor] = {}
        self._pulls: dict[int, Tensor] = {}  # by place among the pictures that the critics are given
        self._doubts: dict[int, Tensor] = {}  # by place among their maps of verdicts

    def as_judge(self, judge: Judge, outputs: Any) -> Judge:
        """Return a judge that says the same, and is heard to pass gradients back to pictures of the fakes' size."""
        self.fakes = {field: getattr(outputs, field).detach() for field in self._fields}
        sizes = {fake.shape[-2:] for fake in self.fakes.values()}
        branch = _branch(self._pulls, lambda picture: picture.shape[-2:] in sizes)
        return lambda *inputs: judge(*(_each_tensor(one, branch) for one in inputs))

    def as_critic(self, critic: Judge) -> Judge:
        """Return a critic that says the same, and is heard to be told where it is wrong."""
        branch = _branch(self._doubts, lambda verdicts: verdicts.dim() == 4)
        return lambda *inputs: _each_tensor(critic(*inputs), branch)

    def pull(self) -> Tensor | None:
        """Return the least slope at a picture that the critics were given; None where they were given none."""
        return torch.stack(list(self._pulls.values())).min() if self._pulls else None

    def doubt(self) -> Tensor | None:
        """Return the mean slope at what the critics said; None where they did not train."""
        return torch.stack(list(self._doubts.values())).mean() if self._doubts else None


def _branch(slopes: dict[int, Tensor], wanted: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    """Return what adds the slopes at tensors that it is called with to `slopes`, by the order of the calls."""
    places = itertools.count()

    def branch(tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and wanted(tensor)):
            return tensor
        place = next(places)

        def note(gradient: Tensor) -> None:
            exact = torch.promote_types(gradient.dtype, torch.float32)
            slope = torch.linalg.vector_norm(gradient, dtype=exact) * math.sqrt(gradient.numel())
            slopes[place] = slopes[place] + slope if place in slopes else slope

        own = tensor.view_as(tensor)  # what passes here alone: the tensor may be used elsewhere too
        own.register_hook(note)
        return own

    return branch


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
        self._noted = 0  # updates in which the generator trained
        self._before: dict[str, Tensor] = {}  # pictures of the last of them
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates = 0  # that were added up

    @torch.no_grad()
    def note(self, number: int, batch: Batch | LabelledBatch, heard: Listener) -> None:
        """Take in an update in which all numbers were finite; one in `EVERY` is measured.

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
        before, self._before = self._before, real | fakes
        self._noted += 1
        if self._noted % EVERY != 2:  # the second is the first with one before it
            return
        for name, pictures in self._before.items():
            succession = torch.cat([before[name][-1:], pictures]).float()
            self._add(f"{name} apart", F.l1_loss(succession[1:], succession[:-1]))
        for field, made in fakes.items():
            source = real[self._fakes[field].source]
            source = source[:: len(source) // len(made)]
            moved = torch.stack([F.l1_loss(made.float(), one) for one in (source, source.flip(-1))]).amin()
            self._add(f"{field} moved", moved)
        for name, slope in (("critic_pull", heard.pull()), ("critic_doubt", heard.doubt())):
            if slope is not None:
                self._add(name, slope)
        self._updates += 1

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def gauges(self) -> dict[str, Gauge]:
        """Return what was measured since the last call, which may be nothing."""
        sums, found = self._sums, dict[str, Gauge]()
        for field, domain in self._fakes.items() if sums else ():
            spread = _ratio(sums[f"{field} apart"], sums[f"{domain.target} apart"])
            change = _ratio(sums[f"{field} moved"], sums[f"{domain.source} apart"])
            found[f"{field}_spread"] = Gauge(spread, LOWEST_SPREAD * self._warm, _SPREAD)
            found[f"{field}_change"] = Gauge(change, LOWEST_CHANGE * self._warm, _CHANGE)
        for name, (lowest, advice) in _OF_CRITICS.items():
            if name in sums:
                found[name] = Gauge(sums[name] / self._updates, lowest * self._warm, advice)
        self._clear()
        return found


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, and 1 where the whole is 0: pictures that are all the same tell nothing."""
    return torch.where(whole > 0, part / whole, torch.ones_like(whole))
