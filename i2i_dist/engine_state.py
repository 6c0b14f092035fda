"""The state of one side in a form that does not depend on how it is sharded.

Every rank knows, without asking, which elements of which parameter it holds and where: that is a `Slot`. Capturing
needs no collective, and whatever is written comes out the same at every ZeRO stage and world size. The private names of
DeepSpeed 0.19 that this rests on are read in `slots`, `_refresh` and `SideEngine.flat_tensors`; the re-save test says
when they have changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from i2i_dist.distributed import rank_and_world
from i2i_dist.engines import SideEngine


class Slot(NamedTuple):
    """Where one parameter lives on this rank.

    `flat[offset : offset + length]` holds the parameter's elements `start ... start + length`, and `flat` is the key of
    their moments in the optimizer's state. Of these this rank writes `own_length` elements from `own_start` on; the two
    differ only where every rank holds a copy.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor
    offset: int
    start: int
    length: int
    own_start: int
    own_length: int

    def held(self, tensor: Tensor) -> Tensor:
        """Return, of a tensor shaped like `flat`, the elements of this parameter held here, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    def owned(self, tensor: Tensor) -> Tensor:
        """Return, of a tensor shaped like `flat`, the elements of this parameter that this rank writes."""
        return self.held(tensor).narrow(0, self.own_start - self.start, self.own_length)


class Piece(NamedTuple):
    """A run of elements of a tensor: `values` (1-D) belongs at element `start` of the flattened whole."""

    start: int
    values: Tensor


class Captured(NamedTuple):
    """This rank's share of a side, and what all ranks know of the whole.

    Attributes:
        tensors: Key -> (full shape, dtype), in the same order on every rank; keys are `param/NAME`, `exp_avg/NAME`,
            `exp_avg_sq/NAME`, `ema/NAME`, `buffer/NAME`.
        scalars: Key -> value of the optimizer's per-parameter numbers, `step/NAME`.
        pieces: Key -> what this rank contributes.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    scalars: dict[str, float]
    pieces: dict[str, Piece]


class Source(Protocol):
    """Where a side is restored from."""

    scalars: Mapping[str, float]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the full shape of every tensor."""

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Return elements `start ... start + length` of a tensor, 1-D."""


def slots(side: SideEngine) -> list[Slot]:
    """Return the slot of every parameter of a side, in the order of `named_parameters`."""
    zero, stage, (rank, world) = side.engine.optimizer, side.layout.stage, rank_and_world()
    flat_of: dict[int, Tensor] = {}
    if stage:
        groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
        for flat, parameters in zip(side.flat_tensors(), groups, strict=True):
            flat_of |= {id(parameter): flat for parameter in parameters}
    found = []
    parameter: Any  # DeepSpeed hangs its own attributes on parameters
    for name, parameter in side.module.named_parameters():
        shape = tuple(parameter.ds_shape if stage == 3 else parameter.shape)
        size = math.prod(shape)
        if stage == 0:
            first, after = size * rank // world, size * (rank + 1) // world
            found.append(Slot(name, shape, parameter, 0, 0, size, first, after - first))
            continue
        if stage == 3:
            _, offset, width = zero.grad_position[zero.get_param_id(parameter)]  # equal pieces, the last one padded
            start = min(rank * width, size)
            length = min(width, size - start)
        else:
            mapping = parameter._hp_mapping  # None: nothing of this parameter lies in this rank's partition
            offset = mapping.hp_fragment_address.start if mapping is not None else 0
            start = mapping.lp_fragment_address.start if mapping is not None else 0
            length = mapping.lp_fragment_address.numel if mapping is not None else 0
        found.append(Slot(name, shape, flat_of[id(parameter)], offset, start, length, start, length))
    return found


def _optimizer_state(side: SideEngine, flat: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Split the optimizer's state of one flat tensor into per-element moments and numbers such as `step`."""
    state = side.optimizer.state.get(flat, {})
    moments = {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}
    numbers = {key: float(value) for key, value in state.items() if key not in moments and value is not None}
    return dict(sorted(moments.items())), numbers


def capture(side: SideEngine, averages: Mapping[str, Tensor]) -> Captured:
    """Return this rank's share of parameters, moments, averages and buffers; no collective, nothing is copied.

    Args:
        side: The side, at the boundary of an update.
        averages: The rank's own elements of the averaged parameters by name (see `ema.py`); may be empty.
    """
    captured = Captured({}, {}, {})
    for slot in slots(side):
        moments, numbers = _optimizer_state(side, slot.flat)
        parts = {"param": slot.owned(slot.flat)} | {key: slot.owned(value) for key, value in moments.items()}
        if averages:
            parts["ema"] = averages[slot.name]
        for kind, values in parts.items():
            captured.tensors[f"{kind}/{slot.name}"] = (slot.shape, torch.float32)
            if slot.own_length:
                captured.pieces[f"{kind}/{slot.name}"] = Piece(slot.own_start, values)
        captured.scalars.update({f"{key}/{slot.name}": value for key, value in numbers.items()})
    for name, buffer in persistent_buffers(side.module).items():
        captured.tensors[f"buffer/{name}"] = (tuple(buffer.shape), buffer.dtype)
        if rank_and_world()[0] == 0:
            captured.pieces[f"buffer/{name}"] = Piece(0, buffer.detach().reshape(-1))
    return captured


def capture_module(module: nn.Module) -> Captured:
    """Return the state of a side that no engine holds: its weights and buffers, and no optimizer has seen them."""
    whole = {f"param/{name}": parameter.detach() for name, parameter in module.named_parameters()}
    whole |= {f"buffer/{name}": buffer for name, buffer in persistent_buffers(module).items()}
    tensors = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in whole.items()}
    return Captured(tensors, {}, {key: Piece(0, tensor.reshape(-1)) for key, tensor in whole.items()})


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to a module's state, without fixed filters and the like."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in names}


@torch.no_grad()
def restore(side: SideEngine, source: Source) -> None:
    """Set parameters, moments and buffers of a side to what `source` holds, at any stage and world size. Collective.

    Raises:
        ValueError: Names or shapes differ, or the optimizer's numbers of parameters that share a flat tensor do.
    """
    found, shapes = slots(side), source.shapes()
    buffers = persistent_buffers(side.module)
    expected = {f"param/{slot.name}": slot.shape for slot in found}
    expected |= {f"buffer/{name}": tuple(buffer.shape) for name, buffer in buffers.items()}
    given = {key: shape for key, shape in shapes.items() if key.startswith(("param/", "buffer/"))}
    if expected != given:
        differing = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        raise ValueError(
            f"parameters or buffers differ in name or shape: {', '.join(differing[:5])} ({len(differing)} in all)"
        )
    sharing: dict[int, list[Slot]] = {}
    for slot in found:
        slot.held(slot.flat).copy_(source.read(f"param/{slot.name}", slot.start, slot.length))
        sharing.setdefault(id(slot.flat), []).append(slot)
    for together in sharing.values():
        _restore_moments(side, together, source, shapes)
    _refresh(side)
    for name, buffer in buffers.items():
        buffer.copy_(source.read(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))


def _restore_moments(
    side: SideEngine, together: list[Slot], source: Source, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Restore the optimizer's state of the slots that share one flat tensor."""
    flat = together[0].flat
    kinds = {key.partition("/")[0] for key in shapes} - {"param", "ema", "buffer"}
    state: dict[str, Any] = {}
    for kind in sorted(kinds):
        state[kind] = torch.zeros_like(flat)  # the padding of a flat tensor must be zero
        for slot in together:
            slot.held(state[kind]).copy_(source.read(f"{kind}/{slot.name}", slot.start, slot.length))
    for kind in {key.partition("/")[0] for key in source.scalars}:
        values = {source.scalars[f"{kind}/{slot.name}"] for slot in together}
        if len(values) > 1:
            raise ValueError(f"'{kind}' differs between parameters that share a flat tensor: {sorted(values)}")
        state[kind] = torch.tensor(values.pop(), dtype=torch.float32, device=flat.device)
    side.optimizer.state.pop(flat, None)
    if state:
        side.optimizer.state[flat] = state


def _refresh(side: SideEngine) -> None:
    """Make DeepSpeed's copies follow the restored fp32 values."""
    zero, stage = side.engine.optimizer, side.layout.stage
    if stage in (1, 2):
        if all(side.optimizer.state.get(flat) for flat in side.flat_tensors()):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()
    elif stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()
