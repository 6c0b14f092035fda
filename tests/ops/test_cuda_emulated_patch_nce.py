"""The CUDA kernels of PatchNCE, emulated, against the definition in fp64 and its autograd.

One rule: an error, as root mean square, is at most twice that of the definition computed in the same kind of
mathematics, or 8 ulp of fp32 (of fp64 for fp64) of the greatest value; what is rounded to 16 bits at the end may be
off by that rounding as well. Gradients are compared in units of 1 / the row's length, so that rows of all lengths
count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from i2i_dist.ops import reference
from tests.ops import emulated

pytestmark = pytest.mark.usefixtures("where")

MODES = ["float", "tf32", "bfloat16", "half", "double"]
DTYPES = {"tf32": torch.float32}
every_mode = pytest.mark.parametrize("mode", MODES)


class Case(NamedTuple):
    """Layers of `shapes` (queries and keys of one group), and what is special about them."""

    shapes: list[tuple[int, int]]
    channels: int
    groups: int = 1
    rows: str = "plain"
    key_offset: int = 0
    temperature: float = 0.07
    eps: float = 1e-7
    diagonal: float | None = None


CASES = {
    "one row": Case([(1, 1)], 3),
    "rows alone with their keys": Case([(1, 1)], 16, groups=3),
    "odd": Case([(37, 37)], 37, groups=2),
    "more keys": Case([(37, 100)], 64, key_offset=61, temperature=1.0, eps=0.0),
    "row tiles": Case([(100, 100)], 100, diagonal=-10.0),
    "column tiles": Case([(5, 190)], 128, groups=2, key_offset=185, temperature=0.01),
    "splits": Case([(61, 300)], 16, key_offset=130, diagonal=0.5),
    "wide tiles": Case([(37, 70)], 200, key_offset=3),
    "whole wide tiles": Case([(10, 150)], 256, temperature=0.01),
    "channels in parts": Case([(21, 41)], 300, groups=2),
    "a weighty class": Case([(21, 41)], 37, diagonal=0.5, temperature=0.01),
    "layers": Case([(37, 37), (1, 5), (70, 80)], 64, groups=2),
    "lengths": Case([(61, 61)], 64, rows="lengths", eps=0.0),
    "short against eps": Case([(40, 40)], 100, rows="lengths"),
    "zeros": Case([(37, 40)], 37, rows="zeros"),
    "zeros, eps 0": Case([(10, 10)], 64, rows="zeros", eps=0.0),
    "solved": Case([(61, 61)], 64, rows="solved", temperature=0.01),
    "solved, mild": Case([(100, 100)], 16, rows="solved"),
    "unsolved": Case([(30, 170)], 64, rows="opposite", temperature=0.01),
    "equal keys": Case([(37, 37)], 100, rows="equal"),
    "slices": Case([(37, 40)], 64, groups=2, rows="strided"),
    "aligned slices": Case([(37, 40)], 100, groups=2, rows="aligned slices"),
    "between vectors": Case([(20, 20)], 64, rows="unaligned"),
}
every_case = pytest.mark.parametrize("name", CASES)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_rows(case: Case, mode: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return queries and keys of every layer."""
    dtype = DTYPES.get(mode, getattr(torch, mode, None))
    queries, keys = [], []
    for layer, (rows, columns) in enumerate(case.shapes):
        query = random(case.groups, rows, case.channels, seed=seed + 2 * layer)
        key = random(case.groups, columns, case.channels, seed=seed + 2 * layer + 1)
        positive = slice(case.key_offset, case.key_offset + rows)
        if case.rows == "lengths":
            # Squares and gradients of fp16 rows have to stay within its range.
            low, high = (-1, 2) if mode == "half" else (-6, 4)
            query *= 10 ** torch.linspace(low, high, rows).double()[:, None]
            key *= 10 ** torch.linspace(high, low, columns).double()[:, None]
        elif case.rows == "zeros":
            query[:, ::3], key[:, 1::4] = 0, 0
        elif case.rows == "solved":
            query += 2 * query[:, :1].clone()
            key[:, positive] = query + 0.01 * key[:, positive]
        elif case.rows == "opposite":
            query = 0.1 * query + query[:, :1]
            key = query[:, :1] * torch.linspace(-1, 1, columns)[:, None].sign() + 0.1 * key
        elif case.rows == "equal":
            key[:] = key[:, :1].clone()
        queries.append(place(query.flatten(0, 1).to(dtype), case.rows))
        keys.append(place(key.flatten(0, 1).to(dtype), case.rows))
    return queries, keys


def place(x: Tensor, rows: str) -> Tensor:
    """Return an equal tensor that lies in memory as `rows` says, among numbers that must not be read."""
    wider = {"strided": (3, 2), "aligned slices": (16, 12), "unaligned": (1, 0)}.get(rows)
    if wider is None:
        return x.clone()
    before, after = wider
    if rows == "unaligned":
        memory = x.new_full((x.numel() + before,), torch.nan)
        memory[before:] = x.flatten()
        return memory[before:].view_as(x)
    memory = x.new_full((len(x), before + x.size(1) + after), torch.nan)
    memory[:, before : before + x.size(1)] = x
    return memory[:, before : before + x.size(1)]


class Results(NamedTuple):
    """Of all layers, one after the other."""

    loss: Tensor
    query_gradient: Tensor
    weighted: Tensor
    key_gradient: Tensor


@contextmanager
def mathematics(mode: str) -> Iterator[None]:
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def run(ops: Any, case: Case, mode: str, queries: list[Tensor], keys: list[Tensor], weights: Tensor) -> Results:
    shared = (case.groups, case.temperature, case.key_offset, case.eps)
    with mathematics(mode):
        loss, statistics, gradient = ops.patch_nce(queries, keys, *shared, case.diagonal, True)
        alone, _, nothing = ops.patch_nce(queries, keys, *shared, case.diagonal, False)
        key_gradient = ops.patch_nce_key_gradient(queries, keys, statistics, weights.to(loss.dtype), *shared)
    assert nothing.shape == (0, case.channels)
    # Without the gradient there are fewer blocks, and so maybe more splits: equal but for the order of sums.
    torch.testing.assert_close(alone, loss, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert gradient.dtype == (torch.float32 if queries[0].dtype == torch.float16 else queries[0].dtype)
    weighted = ops.patch_nce_query_gradient(gradient, weights.to(loss.dtype)).to(queries[0].dtype)
    return Results(loss, gradient.to(queries[0].dtype), weighted, key_gradient)


LossFunction = Callable[[Case, Tensor, Tensor], Tensor]


def definition(case: Case, query: Tensor, key: Tensor) -> Tensor:
    return reference.patch_nce_loss(query, key, **options(case))


def options(case: Case) -> dict[str, Any]:
    names = ("groups", "temperature", "key_offset", "eps", "diagonal")
    return {name: getattr(case, name) for name in names}


class Round(torch.autograd.Function):
    """Rounds to so many bits after the first, and gradients to so many."""

    @staticmethod
    def forward(context: Any, x: Tensor, bits: int, gradient_bits: int) -> Tensor:
        context.bits = gradient_bits
        return round_to(x, bits)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return round_to(grad, context.bits), None, None


def round_to(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2 ** (bits + 1)), exponent - bits - 1)


def rounded(case: Case, query: Tensor, key: Tensor, bits: int, similarity_bits: int) -> Tensor:
    """Compute the definition as eager code does whose products take and give numbers of so many bits."""
    q, k = (Round.apply(reference.l2_normalize(x, case.eps), bits, similarity_bits) for x in (query, key))
    product = q.unflatten(0, (case.groups, -1)) @ k.unflatten(0, (case.groups, -1)).mT
    similarity = Round.apply(product, similarity_bits, bits)
    positive = similarity.diagonal(case.key_offset, 1, 2)[:, : similarity.size(1)].unsqueeze(-1)
    if case.diagonal is not None:
        filling = torch.full_like(positive[..., 0], case.diagonal)
        similarity = torch.cat([positive, torch.diagonal_scatter(similarity, filling, case.key_offset, 1, 2)], dim=-1)
    return ((similarity - positive) / case.temperature).logsumexp(-1).flatten()


def in_short(mode: str) -> LossFunction:
    bits = {"tf32": (10, 23), "half": (10, 10), "bfloat16": (7, 7)}[mode]
    return lambda case, query, key: rounded(case, query.float(), key.float(), *bits)


def differentiate(
    loss_of: LossFunction, case: Case, dtype: torch.dtype, queries: list[Tensor], keys: list[Tensor], weights: Tensor
) -> Results:
    """Compute loss and gradients in `dtype`, gradients in units of 1 / the row's length."""
    parts, first = [], 0
    for query, key in zip(queries, keys, strict=True):
        q, k = (x.detach().to(dtype).requires_grad_() for x in (query, key))
        loss = loss_of(case, q, k)
        weight = weights[first : first + len(loss)]
        first += len(loss)
        [dq] = torch.autograd.grad(loss.sum(), q, retain_graph=True)
        [dk] = torch.autograd.grad(loss, k, weight.to(loss.dtype))
        parts.append(Results(loss.detach(), dq, dq * weight[:, None].to(dq.dtype), dk))
    return in_units(Results(*(torch.cat(field) for field in zip(*parts, strict=True))), queries, keys)


def in_units(results: Results, queries: list[Tensor], keys: list[Tensor]) -> Results:
    query_length, key_length = (torch.cat(x).double().norm(dim=1, keepdim=True) for x in (queries, keys))
    return Results(
        results.loss.double(),
        results.query_gradient.double() * query_length,
        results.weighted.double() * query_length,
        results.key_gradient.double() * key_length,
    )


def assert_accurate(results: Results, case: Case, mode: str, queries: list[Tensor], keys: list[Tensor], w: Tensor):
    dtype, exact_dtype = queries[0].dtype, torch.float64 if mode == "double" else torch.float32
    exact = differentiate(definition, case, torch.float64, queries, keys, w)
    plain = differentiate(definition, case, exact_dtype, queries, keys, w)
    short = plain if mode in ("float", "double") else differentiate(in_short(mode), case, exact_dtype, queries, keys, w)
    # 16-bit rows are multiplied exactly, so that the loss is as good as in fp32.
    peers = Results(short.loss if mode == "tf32" else plain.loss, *short[1:])
    for name, ours, peer, value in zip(Results._fields, in_units(results, queries, keys), peers, exact, strict=True):
        greatest = value.abs().max().item()
        if mode == "double":
            # There is nothing more exact to judge it by, and this is how much exp(similarity / temperature) magnifies.
            greatest = max(greatest, 1) / case.temperature
        if case.rows == "equal" and name != "loss":
            # The terms cancel; this is their size.
            greatest = 1 / case.temperature
        assert ours.isfinite().all(), f"{name} is not finite"
        error, allowed = root_mean_square(ours - value), 2 * root_mean_square(peer - value)
        rounding = torch.finfo(dtype).eps * greatest if name != "loss" and dtype.itemsize == 2 else 0
        allowed = max(allowed, 8 * torch.finfo(exact_dtype).eps * greatest) + rounding
        if case.rows == "equal" and mode == "tf32":
            # Here alone rounding does not hurt the peer, as it rounds the positive and all others alike.
            allowed = 2**-11 / case.temperature
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed is {allowed:.3g}, the greatest {greatest:.3g}"


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def compare(case: Case, mode: str, seed: int = 0, schedule: tuple[int, bool] = (0, True)) -> None:
    queries, keys = make_rows(case, mode, seed)
    weights = random(sum(len(query) for query in queries), seed=seed + 100)
    with emulated.schedule(*schedule) as ops:
        results = run(ops, case, mode, queries, keys, weights)
    assert results.loss.dtype == (torch.float64 if mode == "double" else torch.float32)
    assert {gradient.dtype for gradient in results[1:]} == {queries[0].dtype}
    assert_accurate(results, case, mode, queries, keys, weights)


@every_mode
@every_case
def test_agrees_with_the_definition(name: str, mode: str) -> None:
    compare(CASES[name], mode)


@pytest.mark.parametrize("mode", ["float", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", ["splits", "channels in parts"])
def test_every_schedule_gives_the_same_bits(name: str, mode: str) -> None:
    queries, keys = make_rows(CASES[name], mode, seed=1)
    weights = random(sum(len(query) for query in queries), seed=2)
    results = []
    for schedule in emulated.SCHEDULES:
        with emulated.schedule(*schedule) as ops:
            results.append(run(ops, CASES[name], mode, queries, keys, weights))
    assert_accurate(results[0], CASES[name], mode, queries, keys, weights)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_more_layers_than_one_launch_takes() -> None:
    compare(Case([(3, 4)] * 17 + [(2, 5)], 16), "bfloat16")


def test_a_shared_gradient_of_the_loss() -> None:
    case = CASES["odd"]
    queries, keys = make_rows(case, "float", seed=0)
    weights = torch.full((1,), 0.5).expand(74)
    with emulated.schedule(0, True) as ops:
        ours = run(ops, case, "float", queries, keys, weights)
        same = run(ops, case, "float", queries, keys, weights.clone())
    assert all(a.equal(b) for a, b in zip(ours, same, strict=True))


def test_not_a_number_stays_in_its_row() -> None:
    case = CASES["odd"]
    queries, keys = make_rows(case, "float", seed=0)
    queries[0][3, 5] = torch.nan
    with emulated.schedule(0, True) as ops:
        results = run(ops, case, "float", queries, keys, torch.ones(74))
    assert results.loss.isnan().nonzero().flatten().tolist() == [3]
    assert results.query_gradient.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert results.key_gradient[:37].isnan().any() and results.key_gradient[37:].isfinite().all()


def test_refusals() -> None:
    x = torch.zeros(4, 8)
    with emulated.schedule(0, False) as ops:
        with pytest.raises(ValueError, match="leave rows without a positive"):
            ops.patch_nce([x], [x], 1, 0.07, 1, 1e-7, None, True)
        with pytest.raises(ValueError, match="grad_loss has shape"):
            ops.patch_nce_query_gradient(x, torch.zeros(3))
        with pytest.raises(ValueError, match="statistics has shape"):
            ops.patch_nce_key_gradient([x], [x], torch.zeros(3, 2), torch.zeros(4), 1, 0.07, 0, 1e-7)


def check_float() -> None:
    for name in ("more keys", "splits", "unsolved"):
        compare(CASES[name], "float")


def check_tf32() -> None:
    for name in ("more keys", "unsolved"):
        compare(CASES[name], "tf32", schedule=(1, False))


def check_bfloat16() -> None:
    for name in ("column tiles", "splits", "unsolved"):
        compare(CASES[name], "bfloat16")


def check_bfloat16_early() -> None:
    for seed in range(3):
        compare(CASES["column tiles"], "bfloat16", schedule=(seed, False))


def check_rows() -> None:
    for seed in range(4):
        compare(Case([(61, 61), (64, 64)], 16), "bfloat16", schedule=(seed, False))


def check_parts() -> None:
    compare(CASES["channels in parts"], "bfloat16", schedule=(1, False))
    compare(CASES["channels in parts"], "float")
