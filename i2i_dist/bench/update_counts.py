"""What one update of a method comes to, counted on the meta device, where nothing is allocated or computed.

The update is the trainer's own, `step.update`, with a stand-in for each engine. `torch.distributed` is replaced too, by
two ranks that only write down what is asked of them, so that the collectives of losses and networks show.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from i2i_dist import engines, step
from i2i_dist.data.batch import Batch, LabelledBatch
from i2i_dist.method import SIDES, Labelled, Method, Side, Stream
from i2i_dist.pool import ImagePools

META = torch.device("meta")
_LONGEST = 120  # updates: methods are back where they began long before


class Own(NamedTuple):
    """A collective that no engine makes: in an update `calls` calls, each given `own_bytes` by every rank."""

    kind: str
    own_bytes: int
    calls: float


class SideCounts(NamedTuple):
    """One side in one update.

    Attributes:
        groups: The elements of each parameter, group by group.
        fetched: How often ZeRO 3 brings together each parameter that it has cut, in the order of `groups`.
        steps: How often the side steps.
        steady: Whether its modules run in the same order in every pass, which is what ZeRO 3's prefetching builds on.
    """

    groups: tuple[tuple[int, ...], ...]
    fetched: tuple[tuple[float, ...], ...]
    steps: float
    steady: bool

    @property
    def elements(self) -> int:
        """All of its parameters."""
        return sum(map(sum, self.groups))


class Counts(NamedTuple):
    """What an update is on one rank: means over a cycle of them.

    Attributes:
        batch: Samples of each domain that it was counted with.
        flops: Multiplications and additions of its convolutions and products, forward and backward.
        operators: ATen operators that compute, for each of which a GPU starts a kernel or more. The fused ops count as
            their plain definitions, and the optimizer's steps do not count.
        saved_bytes: What autograd keeps at most at one time, were it all fp32; without the parameters.
        own: The collectives that are no engine's.
        sides: Both sides.
    """

    batch: int
    flops: float
    operators: float
    saved_bytes: int
    own: tuple[Own, ...]
    sides: dict[Side, SideCounts]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        sides = {side: one._asdict() for side, one in self.sides.items()}
        return self._asdict() | {"own": [own._asdict() for own in self.own], "sides": sides}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Counts:
        """Return what `as_json` made plain data of."""
        own = tuple(Own(**one) for one in tree["own"])
        sides = {
            side: SideCounts(**one | {key: tuple(map(tuple, one[key])) for key in ("groups", "fetched")})
            for side, one in tree["sides"].items()
        }
        return Counts(**tree | {"own": own, "sides": sides})


def made_batch(
    method: Method, stream: Stream, count: int, size: int, number: int, device: torch.device
) -> Batch | LabelledBatch:
    """Draw a micro-batch: `count` pictures [3, size, size] of each domain, with valid labels where the stream has any.

    The same `number` draws the same. On the meta device nothing is drawn.
    """
    draw = torch.Generator().manual_seed(number)

    def pictures() -> Tensor:
        if device.type == "meta":
            return torch.empty(count, 3, size, size, device=device)
        return torch.rand(count, 3, size, size, generator=draw).mul_(2).sub_(1).to(device)

    positions = torch.arange(count)
    if not isinstance(method, Labelled):
        return Batch(pictures(), pictures(), positions, number)
    labels = None
    if stream == "labelled":
        classes = torch.from_numpy(method.label_space.classes).float()
        _, each = method.labelled_group or (1, 1)
        labels = classes[positions // each % len(classes)].to(device)
    return LabelledBatch(pictures(), labels, labels, positions, number)


def sketch(method_class: type[Method], config: BaseModel) -> Method:
    """Build a method on the meta device."""
    with torch.device("meta"):
        return method_class(config, torch.Generator())


def _kind(method: Method, update: int) -> tuple[tuple[Side, ...], Stream]:
    return method.turns(update), method.streams[update % len(method.streams)]


def cycle(method: Method) -> int:
    """Return the number of updates after which turns and streams come again."""
    kinds = [_kind(method, update) for update in range(_LONGEST)]
    return next(n for n in range(1, _LONGEST) if kinds[n:] == kinds[:-n])


def count(method_class: type[Method], config: BaseModel, batch: int, size: int) -> Counts:
    """Count a method's updates with `batch` samples, a multiple of its group, of size x size pictures.

    Raises:
        ValueError: The networks cannot take pictures of that size.
    """
    method = sketch(method_class, config)
    kinds: dict[Any, list[int]] = {}
    updates = cycle(method)
    for update in range(updates):
        kinds.setdefault(_kind(method, update), []).append(update)
    found = [
        (len(alike) / updates, _count_one(sketch(method_class, config), stream, batch, size, alike[0]))
        for (_, stream), alike in kinds.items()
    ]
    own: Counter[tuple[str, int]] = Counter()
    for share, one in found:
        for call in one.collectives:
            own[call] += share  # type: ignore[assignment]  # a Counter adds up whatever numbers it is given
    return Counts(
        batch,
        flops=sum(share * one.flops for share, one in found),
        operators=sum(share * one.operators for share, one in found),
        saved_bytes=max(one.saved_bytes for _, one in found),
        own=tuple(Own(*call, calls) for call, calls in own.items()),
        sides={side: _side(method, side, [(share, one.sides[side]) for share, one in found]) for side in SIDES},
    )


class _One(NamedTuple):
    flops: int
    operators: int
    saved_bytes: int
    collectives: list[tuple[str, int]]
    sides: dict[Side, _MetaSide]


def _count_one(method: Method, stream: Stream, batch: int, size: int, number: int) -> _One:
    sides: dict[Side, _MetaSide] = {side: _MetaSide(getattr(method, side)) for side in SIDES}
    pictures = made_batch(method, stream, batch, size, number, META)
    saved = _Saved({p.untyped_storage()._cdata for side in sides.values() for p in side.module.parameters()})
    collectives: list[tuple[str, int]] = []
    pools = ImagePools((), 0, 0)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.keep, saved.give)
    with _plain_ops(), _two_ranks_on_paper(collectives), Work() as work, hooks:
        step.update(method, cast(step.Sides, sides), [pictures], pools, seed=0, number=number, images_seen=0)
    return _One(work.flops, work.operators, saved.peak, collectives, sides)


class Work(TorchDispatchMode):
    """Counts operators that compute, and the multiplications and additions of those that torch has a formula for.

    These are convolutions and products. `FlopCounterMode` has the same formulas, and cannot look at a gradient penalty.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators += not function.is_view
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _MetaWatch(engines._Watch):
    """Looks at every gradient as an engine's does; what it would have seen is in no memory."""

    def take(self) -> Tensor:
        super().take()
        return torch.zeros(())


class _MetaSide:
    """Stands in for a `SideEngine`, and notes which modules run in which pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self._watch = module, _MetaWatch(module, META)
        # A side's turn, or its frozen part in the other's: modules as they run, and whether forward or backward.
        self.passes: list[list[tuple[str, str]]] = []
        self.steps, self._frozen, self._of_frozen = 0, False, list[bool]()
        for name, part in module.named_modules():
            if next(part.parameters(recurse=False), None) is not None:
                part.register_forward_hook(self._noted(name))

    def _noted(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._note(name, "forward")
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda _: self._note(name, "backward"))

        return note

    def _note(self, name: str, direction: str) -> None:
        if not self.passes or self._of_frozen[-1] != self._frozen:
            self.passes.append([])
            self._of_frozen.append(self._frozen)
        self.passes[-1].append((name, direction))

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        self._frozen = True
        self.module.requires_grad_(False)
        try:
            yield self.module
        finally:
            self.module.requires_grad_(True)
            self._frozen = False

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._watch.loss(loss)
        loss.backward()

    def step(self, *, skip: bool) -> None:
        self.steps += 1


def _side(method: Method, side: Side, found: list[tuple[float, _MetaSide]]) -> SideCounts:
    """Sum up a side over the kinds of updates, each with its share of them."""
    module: nn.Module = getattr(method, side)
    steady = len({tuple(one_pass) for _, one in found for one_pass in one.passes}) == 1
    times: Counter[str] = Counter()
    for share, one in found:
        for number, one_pass in enumerate(one.passes):
            # A pass that came as expected, or a second one: all at once. Else every call fetches its own module, and
            # so does every backward.
            runs = Counter(name for name, _ in one_pass)
            for name, calls in runs.items():
                times[name] += share * (1 if steady or number else calls)  # type: ignore[assignment]
    owners = {id(p): name for name, part in module.named_modules() for p in part.parameters(recurse=False)}
    groups = [list(group.parameters) for group in method.parameter_groups()[side]]
    return SideCounts(
        groups=tuple(tuple(p.numel() for p in group) for group in groups),
        fetched=tuple(tuple(float(times[owners[id(p)]]) for p in group) for group in groups),
        steps=sum(share * one.steps for share, one in found),
        steady=steady,
    )


class _Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor, saved: _Saved) -> None:
        self.tensor, self._saved = tensor, saved
        saved.change(tensor, 1)

    def __del__(self) -> None:
        self._saved.change(self.tensor, -1)


class _Saved:
    """Adds up the memory behind what autograd keeps, each piece once, but for the `parameters`."""

    def __init__(self, parameters: set[int]) -> None:
        self.bytes = self.peak = 0
        self._parameters, self._holders = parameters, Counter[int]()

    def keep(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor, self)

    def give(self, kept: _Kept) -> Tensor:
        return kept.tensor

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._parameters:
            return
        before = self._holders[storage._cdata]
        self._holders[storage._cdata] += by
        if 0 in (before, before + by):
            self.bytes += by * storage.nbytes()
            self.peak = max(self.peak, self.bytes)


@contextlib.contextmanager
def _plain_ops() -> Iterator[None]:
    """Run the definitions of the fused ops, whose products can be counted."""
    before = os.environ.get("I2I_DIST_OPS")
    os.environ["I2I_DIST_OPS"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("I2I_DIST_OPS") if before is None else os.environ.update(I2I_DIST_OPS=before)


@contextlib.contextmanager
def _two_ranks_on_paper(log: list[tuple[str, int]]) -> Iterator[None]:
    """Let `torch.distributed` say that there are two ranks, and note what this one gives to each collective."""

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> None:
        log.append(("all_reduce", tensor.nbytes))

    def all_gather(parts: list[Tensor], own: Tensor, *_: Any, **__: Any) -> None:
        log.append(("all_gather", own.nbytes))

    replaced: dict[str, Any] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda *_: 2,
        "get_rank": lambda *_: 0,
        "all_reduce": all_reduce,
        "all_gather": all_gather,
    }
    before = {name: getattr(torch.distributed, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(torch.distributed, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(torch.distributed, name, function)
