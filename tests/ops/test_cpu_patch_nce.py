"""The CPU kernels of PatchNCE against the reference in fp64, and against what they promise beyond it."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from i2i_dist import ops
from i2i_dist.ops import reference

pytestmark = pytest.mark.skipif("patch_nce" not in ops.build_info()["cpu"], reason="the extension is not built")

native = torch.ops.i2i_dist


class Case(NamedTuple):
    """Layers of (queries, keys) per group, and the arguments of the op."""

    layers: tuple[tuple[int, int], ...] = ((24, 24),)
    channels: int = 16
    groups: int = 1
    temperature: float = 0.07
    key_offset: int = 0
    eps: float = 1e-7
    diagonal: float | None = None
    magnitude: float = 1.0
    dtype: torch.dtype = torch.float32

    def rows(self) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(7)

        def draw(count: int) -> Tensor:
            x = torch.randn(self.groups * count, self.channels, generator=generator, dtype=torch.float64)
            return (x * self.magnitude).to(self.dtype)

        queries, keys = [draw(p) for p, _ in self.layers], [draw(k) for _, k in self.layers]
        for query, key in zip(queries, keys, strict=True):  # positives that are nearer than the negatives, unequally so
            near = torch.arange(len(query) // self.groups) % 3 == 0
            own = key.unflatten(0, (self.groups, -1))[:, self.key_offset : self.key_offset + len(near)]
            query.unflatten(0, (self.groups, -1))[:, near] += 2 * own[:, near]
        return queries, keys

    def weights(self) -> Tensor:
        count = sum(self.groups * p for p, _ in self.layers)
        return torch.linspace(-1, 1, count, dtype=torch.promote_types(self.dtype, torch.float32))


class Results(NamedTuple):
    loss: Tensor
    grad_query: Tensor
    grad_key: Tensor


def run_native(case: Case, queries: list[Tensor], keys: list[Tensor]) -> Results:
    numbers = (case.groups, case.temperature, case.key_offset, case.eps)
    loss, statistics, gradient = native.patch_nce(queries, keys, *numbers, case.diagonal, True)
    plain = native.patch_nce(queries, keys, *numbers, case.diagonal, False)
    assert torch.equal(plain[0], loss) or loss.isnan().any()
    assert plain[2].shape == (0, case.channels)
    # Prepared in fp32 for fp16, so that a scaled loss does not meet what has been rounded to nothing.
    assert gradient.dtype == (torch.float32 if case.dtype == torch.float16 else case.dtype)
    grad_query = native.patch_nce_query_gradient(gradient, case.weights()).to(case.dtype)
    grad_key = native.patch_nce_key_gradient(queries, keys, statistics, case.weights(), *numbers)
    return Results(loss, grad_query, grad_key)


def run_reference(case: Case, queries: list[Tensor], keys: list[Tensor], dtype: torch.dtype) -> Results:
    leaves = [[x.detach().to(dtype, copy=True).requires_grad_() for x in rows] for rows in (queries, keys)]
    losses = [
        reference.patch_nce_loss(
            q,
            k,
            groups=case.groups,
            temperature=case.temperature,
            key_offset=case.key_offset,
            eps=case.eps,
            diagonal=case.diagonal,
        )
        for q, k in zip(*leaves, strict=True)
    ]
    loss = torch.cat(losses)
    grads = torch.autograd.grad((loss * case.weights().to(loss.dtype)).sum(), [*leaves[0], *leaves[1]])
    return Results(loss.detach(), torch.cat(grads[: len(queries)]), torch.cat(grads[len(queries) :]))


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, slack: float = 1.0) -> None:
    """The house's rule: at most twice the reference's error, or 8 units in the last place of the greatest value."""
    assert ours.shape == exact.shape
    scale = exact.abs().max()
    allowed = max(2 * (theirs.double() - exact).abs().max(), 8 * torch.finfo(ours.dtype).eps * scale * slack)
    assert (ours.double() - exact).abs().max() <= allowed


CASES = [
    Case(),
    Case(dtype=torch.float64),
    Case(dtype=torch.bfloat16),
    Case(dtype=torch.float16, channels=37),
    Case(layers=((1, 1),)),
    Case(layers=((1, 1), (5, 5), (33, 33)), channels=1),
    Case(layers=((256, 256),), channels=256),
    Case(layers=((3, 3), (300, 300), (17, 17)), channels=37, groups=3),
    Case(layers=((3, 3), (300, 300), (17, 17)), channels=37, groups=2, dtype=torch.float64),
    Case(layers=((20, 70), (7, 530)), channels=65, groups=2, key_offset=11),
    Case(layers=((20, 70), (7, 530)), channels=65, groups=2, key_offset=11, diagonal=-10.0),
    Case(layers=((40, 40),), channels=1024, diagonal=0.5),
    Case(layers=((40, 40),), channels=999, diagonal=60.0),
    Case(layers=((600, 600),), channels=64, temperature=0.01),
    Case(layers=((600, 600),), channels=3, temperature=0.01),
    Case(layers=((50, 50),), channels=33, temperature=0.01, dtype=torch.float64, diagonal=-1.0),
    Case(layers=((64, 64),), channels=3, temperature=1.0),
    Case(layers=((64, 64),), magnitude=1e-6),
    Case(layers=((64, 64),), magnitude=1e-6, eps=1e-3),
    Case(layers=((64, 64),), magnitude=1e4, dtype=torch.bfloat16),
    Case(layers=((64, 64),), magnitude=1e4, eps=0.0),
]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: Case) -> None:
    queries, keys = case.rows()
    ours = run_native(case, queries, keys)
    exact = run_reference(case, queries, keys, torch.float64)
    theirs = run_reference(case, queries, keys, torch.promote_types(case.dtype, torch.float32))
    assert ours.loss.dtype == theirs.loss.dtype
    assert ours.grad_query.dtype == ours.grad_key.dtype == case.dtype
    # In fp64 the reference's own error is not known. Similarities are off by some units, 1 / temperature times as large
    # in the exponent.
    slack = max(1, 1 / case.temperature) if case.dtype == torch.float64 else 1
    for mine, their, truth in zip(ours, theirs, exact, strict=True):
        assert_as_exact(mine, their.to(mine.dtype), truth, slack)


def test_the_rule_catches_an_error_of_a_few_units() -> None:
    case = Case(layers=((64, 64),))
    queries, keys = case.rows()
    exact, theirs = (run_reference(case, queries, keys, d).loss for d in (torch.float64, torch.float32))
    with pytest.raises(AssertionError):
        assert_as_exact(theirs * (1 + 2e-6), theirs, exact)


def test_statistics() -> None:
    case = Case(layers=((30, 30),), diagonal=0.3)
    queries, keys = case.rows()
    q, k = (ops.l2_normalize(x.double()) for x in (queries[0], keys[0]))
    logits = torch.cat([q @ k.T, torch.full((30, 1), 0.3)], dim=1) / case.temperature
    for diagonal, classes in ((None, 30), (0.3, 31)):
        statistics = native.patch_nce(queries, keys, 1, case.temperature, 0, case.eps, diagonal, False)[1]
        logsumexp = logits[:, :classes].logsumexp(1)
        others = 1 - (logits.diagonal() - logsumexp).exp()
        torch.testing.assert_close(statistics.double(), torch.stack([logsumexp, others], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_to_a_few_units(dtype: torch.dtype) -> None:
    """Two rows with similarities 1 and 0 have the loss log(1 + 2^-v) for temperature 1 / (v ln 2).

    The exponent v comes back exactly in fp32; in fp64 with the rounding of the temperature.
    """
    rows, unit = [torch.eye(2, dtype=dtype)], torch.finfo(dtype).eps
    of_exponent = 1 if dtype == torch.float64 else 0
    for v in torch.linspace(0, 120, 997, dtype=dtype).tolist()[1:]:
        loss = native.patch_nce(rows, rows, 1, 1 / (v * math.log(2)), 0, 0.0, None, False)[0]
        assert loss.tolist() == pytest.approx([math.log1p(2.0**-v)] * 2, rel=(3 + of_exponent * v) * unit, abs=0)


def test_nearly_solved_rows_keep_their_digits() -> None:
    rows = [torch.eye(256)]
    loss, statistics, _ = native.patch_nce(rows, rows, 1, 0.02, 0, 0.0, None, False)
    expected = 255 * math.exp(-50)
    torch.testing.assert_close(loss, torch.full((256,), expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics[:, 1], torch.full((256,), expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("far", [0, 299])
def test_hopeless_rows_do_not_overflow(far: int) -> None:
    """The positive is opposite, and one negative the row itself: 200 in the exponent at temperature 0.01."""
    query = torch.nn.functional.one_hot(torch.tensor([0]), 8).float()
    key = torch.zeros(300, 8)
    key[:, 1:] = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    key[150], key[far] = -query[0], query[0]
    loss, _, gradient = native.patch_nce([query], [key], 1, 0.01, 150, 0.0, None, True)
    assert loss.item() == pytest.approx(200)
    assert gradient.isfinite().all()


def test_rows_at_any_stride() -> None:
    case = Case(layers=((30, 30),), channels=19, groups=2)
    [query], [key] = case.rows()
    expected = run_native(case, [query], [key])
    wide, spaced = torch.full((60, 40), math.nan), torch.full((120, 19), math.nan)
    wide[:, 5:24], spaced[::2] = query, key
    for got, want in zip(run_native(case, [wide[:, 5:24]], [spaced[::2]]), expected, strict=True):
        assert torch.equal(got, want)
    case = Case(layers=((4, 4),), channels=19)
    one = query[:1].expand(4, 19)
    for got, want in zip(run_native(case, [one], [one]), run_native(case, [one.clone()], [one.clone()]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_rows_of_zeros_are_finite_and_get_no_gradient(eps: float) -> None:
    case = Case(layers=((20, 20),), eps=eps)
    [query], [key] = case.rows()
    query[3], key[3], key[7] = 0, 0, 0
    ours = run_native(case, [query], [key])
    exact = run_reference(case, [query], [key], torch.float64)
    theirs = run_reference(case, [query], [key], torch.float32)
    for mine, their, truth in zip(ours, theirs, exact, strict=True):
        assert_as_exact(mine, their, truth)
    assert not ours.grad_query[3].any() and not ours.grad_key[[3, 7]].any()
    assert ours.grad_query[4].all() and ours.grad_key[4].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_reaches_the_losses_that_it_belongs_to(dtype: torch.dtype, value: float) -> None:
    case = Case(layers=((20, 20), (300, 300)), groups=2, dtype=dtype)
    queries, keys = case.rows()
    queries[0][3, 5] = value
    assert run_native(case, queries, keys).loss.isnan().nonzero().flatten().tolist() == [3]
    keys[1][590, 5] = value  # in the second group of the second layer
    assert run_native(case, queries, keys).loss.isnan().nonzero().flatten().tolist() == [3, *range(340, 640)]


@pytest.fixture
def threads() -> Any:
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layers", [((40, 40),), ((256, 256), (256, 256)), ((700, 900), (5, 6))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads_or_reruns(layers: Any, dtype: torch.dtype, threads: Any) -> None:
    case = Case(layers=layers, channels=48, dtype=dtype)
    queries, keys = case.rows()
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(run_native(case, queries, keys))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MEMORY = """
import pathlib, torch
from i2i_dist import ops
ops.build_info()
def status(key):
    [line] = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) // 1024
def native(rows):
    loss, statistics, gradient = torch.ops.i2i_dist.patch_nce([rows], [rows], 1, 0.07, 0, 1e-7, None, True)
    torch.ops.i2i_dist.patch_nce_query_gradient(gradient, loss)
    torch.ops.i2i_dist.patch_nce_key_gradient([rows], [rows], statistics, loss, 1, 0.07, 0, 1e-7)
def reference(rows):
    rows = rows.clone().requires_grad_()
    ops.reference.patch_nce_loss(rows, rows).sum().backward()
rows = torch.randn(4096, 32)
for form in (native, reference):
    form(rows[:300])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, that of loading torch is forgotten
    before = status("VmRSS")
    form(rows)
    print(status("VmHWM") - before)
"""


def test_memory_stays_far_below_the_similarity_matrix() -> None:
    """The matrix of 4096 x 4096 would hold 64 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    ours, theirs = map(int, done.stdout.split())
    assert ours <= 8 and theirs >= 64


ROWS = torch.ones(6, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"queries": []}, "0 queries and 1 keys"),
        ({"queries": [ROWS[:0]]}, "leave rows without a positive"),
        ({"queries": [ROWS[:, :0]], "keys": [ROWS[:, :0]]}, r"layer 0 has rows \[6, 0\]"),
        ({"queries": [ROWS.T.contiguous().T]}, "elements of a row must be adjacent"),
        ({"queries": [ROWS, ROWS], "keys": [ROWS, ROWS[:, :2]]}, "layer 1 has rows"),
        ({"keys": [ROWS.double()]}, "Double"),
        ({"queries": [ROWS.long()], "keys": [ROWS.long()]}, "Long"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 4}, "groups=4"),
        ({"key_offset": 1}, "key_offset=1"),
        ({"key_offset": -1}, "key_offset=-1"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, Any], sentence: str) -> None:
    good = {"queries": [ROWS], "keys": [ROWS], "groups": 1, "temperature": 0.07, "key_offset": 0, "eps": 1e-7}
    statistics = torch.ones(6, 2)
    with pytest.raises(ValueError, match=sentence):
        native.patch_nce(**{**good, "diagonal": None, "with_gradient": True, **change})
    with pytest.raises(ValueError, match=sentence):
        native.patch_nce_key_gradient(**{**good, "statistics": statistics, "grad_loss": statistics[:, 0], **change})


def test_bad_statistics_are_refused() -> None:
    statistics = torch.ones(6, 2)
    arguments = (1, 0.07, 0, 1e-7)
    with pytest.raises(ValueError, match="statistics has shape"):
        native.patch_nce_key_gradient([ROWS], [ROWS], statistics[1:], statistics[:, 0], *arguments)
    with pytest.raises(ValueError, match="grad_loss has shape"):
        native.patch_nce_key_gradient([ROWS], [ROWS], statistics, statistics[:, 0].double(), *arguments)
    with pytest.raises(ValueError, match="grad_loss has shape"):
        native.patch_nce_query_gradient(ROWS, statistics[1:, 0])
    with pytest.raises(ValueError, match="gradient has shape"):
        native.patch_nce_query_gradient(ROWS[0], statistics[:4, 0])
