"""The cases that the kernels are measured at: their inputs, the forms that compete, what is right, and the floor."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from i2i_dist import ops
from i2i_dist.bench import rivals
from i2i_dist.ops import reference

Op = Literal["patch_nce", "adalin", "iln", "instance_norm_act", "patch_gather"]
Precision = Literal["fp32", "tf32", "bf16"]

CHECKED_ROWS = 1024  # query rows at a time, so that the fp64 reference never holds a whole matrix of similarities
GATHERED = 256


class Case(NamedTuple):
    """One op at one size. `shape` is (layers, groups, rows, channels) for patch_nce and (N, C, H, W) for all others."""

    op: Op
    shape: tuple[int, int, int, int]
    precision: Precision = "fp32"
    channels_last: bool = False

    @property
    def size(self) -> str:
        """What tables call the shape."""
        if self.op != "patch_nce":
            return "x".join(map(str, self.shape)) + (" channels_last" if self.channels_last else "")
        layers, groups, rows, _ = self.shape
        return f"{groups}x{rows}" + (f", {layers} layers" if layers > 1 else "")

    @property
    def name(self) -> str:
        """What `--cases` matches."""
        return f"{self.op} {self.size} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the large tensors."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def native_op(self) -> str:
        """The kernel under the op."""
        return "adalin" if self.op == "iln" else self.op


class Form(NamedTuple):
    """One way to compute a case: `function(*leaves)`, whose gradient with respect to the leaves is wanted.

    A form with `gradient` stands for the gradient alone, which `gradient` completes from what `function` returns.
    """

    name: str
    function: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    compiled: str | None = None  # the mode for torch.compile
    gradient: Callable[[Tensor], Tensor] | None = None


class Exact(NamedTuple):
    """The fp64 reference's output and the gradients with respect to the leaves."""

    output: Tensor
    gradients: Sequence[Tensor]


class Problem(NamedTuple):
    """A case with its tensors."""

    forms: Sequence[Form]
    grad: Tensor | None  # of the output; None for a scalar
    exact: Callable[[], Exact]
    floor_bytes: int  # of the passes over large tensors that cannot be spared, forward and backward
    floor_operations: int  # of matrix products


def default_cases(device_type: str) -> list[Case]:
    """Return what is measured on a kind of device when nothing else is asked for."""
    return _cpu_cases() if device_type == "cpu" else _cuda_cases()


def _cpu_cases() -> list[Case]:
    sizes = [(1, 256), (16, 256), (64, 256), (1, 1024), (1, 4096), (1, 8192)]
    cases = [_nce(groups, rows) for groups, rows in sizes]
    cases += [_nce(1, 256, layers=5), _nce(16, 256, "bf16"), _nce(1, 4096, "bf16")]
    for shape in [(1, 256, 64, 64), (4, 256, 64, 64), (1, 256, 128, 128), (2, 256, 128, 128)]:
        cases.append(Case("adalin", shape))
    cases += [Case("adalin", shape, "bf16") for shape in [(1, 256, 64, 64), (2, 256, 128, 128)]]
    cases += [Case("iln", (1, 128, 128, 128)), Case("iln", (1, 64, 256, 256))]
    for shape in [(1, 64, 256, 256), (1, 128, 128, 128), (1, 256, 64, 64), (4, 256, 64, 64)]:
        cases.append(Case("instance_norm_act", shape))
    cases += [Case("instance_norm_act", (1, 256, 64, 64), channels_last=True)]
    cases += [Case("instance_norm_act", (1, 256, 64, 64), "bf16")]
    return cases + _gathers(["fp32"])


def _cuda_cases() -> list[Case]:
    exact: list[Precision] = ["fp32", "bf16"]
    all_modes: list[Precision] = ["fp32", "tf32", "bf16"]
    sizes = [(1, 256), (16, 256), (64, 256), (1, 1024), (16, 1024), (1, 4096), (1, 8192), (16, 4096), (1, 16384)]
    cases = [_nce(groups, rows, mode) for groups, rows in [*sizes, (1, 65536)] for mode in all_modes]
    cases += [_nce(1, 256, mode, layers=5) for mode in all_modes]
    maps = [(1, 256, 64, 64), (4, 256, 64, 64), (32, 256, 64, 64), (1, 256, 128, 128), (4, 256, 128, 128)]
    maps += [(32, 256, 128, 128), (1, 256, 256, 256), (4, 256, 256, 256), (32, 256, 256, 256)]
    cases += [Case("adalin", shape, mode) for shape in maps for mode in exact]
    cases += [Case("iln", shape, mode) for shape in [(1, 128, 128, 128), (1, 64, 256, 256)] for mode in exact]
    maps = [(1, 64, 256, 256), (1, 128, 128, 128), (1, 256, 64, 64)]
    cases += [Case("instance_norm_act", shape, mode) for shape in maps for mode in exact]
    for layout in (False, True):
        cases += [Case("instance_norm_act", (4, *shape[1:]), "bf16", layout) for shape in maps]
    return cases + _gathers(exact)


def _nce(groups: int, rows: int, precision: Precision = "fp32", layers: int = 1) -> Case:
    return Case("patch_nce", (layers, groups, rows, 256), precision)


def _gathers(precisions: Sequence[Precision]) -> list[Case]:
    return [Case("patch_gather", (1, 256, 64, 64), mode, layout) for layout in (False, True) for mode in precisions]


def build(case: Case, device: torch.device) -> Problem:
    """Make the tensors of `case`, the same at every call, and the forms that compute it."""
    draw = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    builders = {"patch_nce": _build_patch_nce, "patch_gather": _build_gather, "instance_norm_act": _build_norm}
    return builders.get(case.op, _build_adalin)(case, device, draw)


def _plain_forms(function: Callable[..., Tensor], leaves: Sequence[Tensor], products: bool) -> list[Form]:
    """Return `function` as it is and compiled; max-autotune is torch.compile again where nothing can be tuned."""
    forms = [Form("eager", function, leaves), Form("torch.compile", function, leaves, "default")]
    if products or leaves[0].device.type == "cuda":
        # CUDA graphs are measured for every form, so this one does not bring its own.
        forms.append(Form("torch.compile max-autotune", function, leaves, "max-autotune-no-cudagraphs"))
    return forms


def _build_patch_nce(case: Case, device: torch.device, draw: torch.Generator) -> Problem:
    layers, groups, rows, channels = case.shape
    wide = torch.randn(2, layers, groups * rows, channels, generator=draw)
    wide[1] += 0.5 * wide[0]  # the patch of the output resembles the one of the input, as in the midst of a training
    queries, keys = (list(part.to(device, case.dtype).unbind()) for part in wide)
    queries = [query.requires_grad_() for query in queries]

    def eager(*leaves: Tensor) -> Tensor:
        # What a training in bf16 does: products in bf16, what needs more in fp32.
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            return rivals.patch_nce(leaves, keys, groups)

    def ours(*leaves: Tensor) -> Tensor:
        losses = ops.patch_nce_losses(leaves, keys, groups=groups, temperature=rivals.TEMPERATURE)
        return torch.stack([loss.mean() for loss in losses]).mean()

    elements = layers * groups * rows * channels
    return Problem(
        [*_plain_forms(eager, queries, products=True), _attention(queries, keys, groups), Form("ours", ours, queries)],
        grad=None,
        exact=functools.partial(_exact_patch_nce, queries, keys, groups),
        floor_bytes=3 * elements * case.dtype.itemsize,  # queries, keys, the queries' gradient
        floor_operations=4 * elements * rows,  # the similarities, and their softmax times the keys
    )


def _attention(queries: Sequence[Tensor], keys: Sequence[Tensor], groups: int) -> Form:
    """The gradient by torch's attention: with values = keys it returns the sum that the gradient is made of.

    Rows are normalised beforehand, and neither the loss nor the way back through the normalisation is in it.
    """
    raw = torch.stack([query.detach() for query in queries]).unflatten(1, (groups, -1))
    unit = rivals.unit_rows(raw.float()).to(raw.dtype)
    unit_keys = rivals.unit_rows(torch.stack(list(keys)).float()).to(raw.dtype).unflatten(1, (groups, -1))

    def function(query: Tensor) -> Tensor:
        with torch.no_grad():
            gradient: Tensor = (rivals.attention(query, unit_keys) - unit_keys) / rivals.TEMPERATURE
            return gradient

    def complete(unscaled: Tensor) -> Tensor:
        """Return the gradient of the mean with respect to the raw rows."""
        wide, direction = unscaled.double() / unscaled[..., 0].numel(), rivals.unit_rows(raw.double())
        across = wide - direction * (direction * wide).sum(-1, keepdim=True)
        gradient: Tensor = across / raw.double().norm(dim=-1, keepdim=True)
        return gradient.flatten(1, 2)

    return Form("attention, gradient only", function, [unit], gradient=complete)


def _exact_patch_nce(queries: Sequence[Tensor], keys: Sequence[Tensor], groups: int) -> Exact:
    """The reference in fp64, some rows of a group at a time: they do not depend on each other, keys being detached."""
    total, gradients = 0.0, []
    for query, key in zip(queries, keys, strict=True):
        parts = []
        for q, k in zip(query.detach().double().chunk(groups), key.double().chunk(groups), strict=True):
            for start in range(0, len(q), CHECKED_ROWS):
                rows = q[start : start + CHECKED_ROWS].clone().requires_grad_()
                loss = reference.patch_nce_loss(rows, k, key_offset=start, temperature=rivals.TEMPERATURE).sum()
                parts.append(torch.autograd.grad(loss, rows)[0])
                total += loss.item()
        gradients.append(torch.cat(parts))
    count = sum(len(query) for query in queries)
    output = torch.tensor(total / count, dtype=torch.float64, device=queries[0].device)
    return Exact(output, [gradient / count for gradient in gradients])


def _map(case: Case, device: torch.device, draw: torch.Generator) -> Tensor:
    """Draw a map whose channels have means and scales of their own: otherwise both norms of AdaLIN are the same.

    No value is near the mean of its channel, where rounding would decide on which side of a ReLU's step it lies.
    """
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    mean, scale = torch.randn(2, case.shape[1], 1, 1, generator=draw)
    deviation = torch.randn(case.shape, generator=draw)
    x: Tensor = (deviation + 0.2 * deviation.sign() + mean) * scale.exp()
    return x.to(device, case.dtype).contiguous(memory_format=layout)


def _build_adalin(case: Case, device: torch.device, draw: torch.Generator) -> Problem:
    images, channels = case.shape[:2]
    x, grad = (_map(case, device, draw) for _ in range(2))
    shape = (images, channels) if case.op == "adalin" else (channels,)
    drawn = [torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)]
    drawn.append(torch.rand(channels, generator=draw))
    # The rivals take them in the dtype of x, which spares them a promotion of every map to fp32.
    narrow = [value.to(device, case.dtype).requires_grad_() for value in drawn]
    wide = [value.detach().float().requires_grad_() for value in narrow]
    plain = rivals.adalin if case.op == "adalin" else rivals.iln
    op = ops.adalin if case.op == "adalin" else ops.iln
    x.requires_grad_()
    forms = [*_plain_forms(plain, [x, *narrow], products=False), Form("ours", op, [x, *wide])]

    def exact() -> Exact:
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *wide)]
        gamma, beta = (leaf.expand(images, channels) for leaf in leaves[1:3])
        return _differentiate(reference.adalin(leaves[0], gamma, beta, leaves[3]), leaves, grad)

    # The layer's statistics need the whole image, which does not stay on the chip: x is read twice, and so is its
    # gradient with it.
    return Problem(forms, grad, exact, 8 * x.numel() * x.element_size(), 0)


def _build_norm(case: Case, device: torch.device, draw: torch.Generator) -> Problem:
    x, grad = (_map(case, device, draw) for _ in range(2))
    x.requires_grad_()
    forms = _plain_forms(rivals.instance_norm, [x], products=False)
    if device.type == "cpu":
        forms.append(Form("eager, group norm", rivals.group_norm, [x]))
    forms.append(Form("ours", functools.partial(ops.instance_norm_act, activation="relu"), [x]))

    def exact() -> Exact:
        leaf = x.detach().double().requires_grad_()
        return _differentiate(reference.instance_norm_act(leaf, activation="relu"), [leaf], grad)

    # Forward reads x and writes y; backward reads x and the gradient of y, and writes that of x.
    return Problem(forms, grad, exact, 5 * x.numel() * x.element_size(), 0)


def _build_gather(case: Case, device: torch.device, draw: torch.Generator) -> Problem:
    images, channels, height, width = case.shape
    x = _map(case, device, draw).requires_grad_()
    ids = torch.randperm(height * width, generator=draw)[:GATHERED].to(device)
    grad = torch.randn(images, len(ids), channels, generator=draw).to(device, case.dtype)

    def plain(features: Tensor) -> Tensor:
        return rivals.gather(features, ids)

    def ours(features: Tensor) -> Tensor:
        return ops.patch_gather(features, ids)

    def exact() -> Exact:
        leaf = x.detach().double().requires_grad_()
        return _differentiate(reference.patch_gather(leaf, ids), [leaf], grad)

    forms = [*_plain_forms(plain, [x], products=False), Form("ours", ours, [x])]
    # Forward reads and writes the sampled features; backward reads their gradient and writes the map's.
    return Problem(forms, grad, exact, (3 * grad.numel() + x.numel()) * x.element_size(), 0)


def _differentiate(output: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> Exact:
    return Exact(output.detach(), torch.autograd.grad(output, leaves, grad.double()))
