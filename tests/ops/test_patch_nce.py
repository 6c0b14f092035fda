"""The PatchNCE op against the papers' formulation, known values and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i2i_dist import ops


def rows(count: int, dim: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=dtype).requires_grad_()


def papers_form(query: Tensor, key: Tensor, groups: int, temperature: float) -> Tensor:
    """Compute the loss in the roundabout way of the published methods: cosines, a mask of -10, N + 1 classes."""
    images = zip(query.chunk(groups), key.chunk(groups), strict=True)
    losses = []
    for q, k in images:
        q, k = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7) for x in (q, k))
        positive = F.cosine_similarity(q, k, dim=1)[:, None]
        others = F.cosine_similarity(q[:, None, :], k[None, :, :], dim=2)
        others = others.masked_fill(torch.eye(len(q), dtype=torch.bool), -10.0)
        logits = torch.cat([positive, others], dim=1) / temperature
        losses.append(F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("diagonal", [None, -10.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_agrees_with_the_papers_form(diagonal: float | None, groups: int) -> None:
    query, key, weight = rows(24), rows(24, seed=1), rows(24, 1, seed=2).detach()[:, 0]
    loss = ops.patch_nce_loss(query, key, groups=groups, diagonal=diagonal)
    expected = papers_form(query, key, groups, 0.07)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad((loss * weight).sum(), (query, key))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_known_values() -> None:
    equal = torch.ones(256, 256)
    torch.testing.assert_close(ops.patch_nce_loss(equal, equal), torch.full((256,), math.log(256)))
    orthonormal = torch.eye(256)
    loss = ops.patch_nce_loss(orthonormal, orthonormal)
    assert loss[0].item() == pytest.approx(math.log1p(255 * math.exp(-1 / 0.07)), rel=1e-3)
    assert loss[0].item() == pytest.approx(1.593e-4, rel=1e-3)


def test_masked_form_equals_the_plain_one_for_normalised_rows() -> None:
    query, key = rows(32, dtype=torch.float32), rows(32, seed=1, dtype=torch.float32)
    plain, masked = (ops.patch_nce_loss(query, key, groups=2, diagonal=d) for d in (None, -10.0))
    torch.testing.assert_close(plain, masked, rtol=1e-6, atol=1e-6)
    nearer = ops.patch_nce_loss(query, key, groups=2, diagonal=0.5)
    assert not torch.allclose(nearer, plain)


def test_groups_see_only_their_own_keys() -> None:
    query, key = rows(12), rows(12, seed=1)
    whole = ops.patch_nce_loss(query, key, groups=2)
    parts = [ops.patch_nce_loss(q, k) for q, k in zip(query.chunk(2), key.chunk(2), strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert not torch.allclose(whole, ops.patch_nce_loss(query, key))


@pytest.mark.parametrize("diagonal", [None, -10.0])
def test_offset_places_the_positives_among_gathered_keys(diagonal: float | None) -> None:
    query, key = rows(12), rows(12, seed=1)
    whole = ops.patch_nce_loss(query, key, diagonal=diagonal)
    shares = [ops.patch_nce_loss(query[i : i + 4], key, key_offset=i, diagonal=diagonal) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(shares), whole)
    in_groups = ops.patch_nce_loss(query[[2, 3, 8, 9]], key, groups=2, key_offset=2, diagonal=diagonal)
    torch.testing.assert_close(in_groups, ops.patch_nce_loss(query, key, groups=2, diagonal=diagonal)[[2, 3, 8, 9]])


@pytest.mark.parametrize("diagonal", [None, -10.0, 0.5])
def test_gradients(diagonal: float | None) -> None:
    def loss(query: Tensor, key: Tensor) -> Tensor:
        return ops.patch_nce_loss(query, key, groups=2, temperature=0.3, key_offset=1, eps=1e-3, diagonal=diagonal)

    assert torch.autograd.gradcheck(loss, (rows(6, 4), rows(10, 4, seed=1)))
    assert torch.autograd.gradcheck(ops.l2_normalize, (rows(3, 4),))


def test_key_gradients_follow_the_key() -> None:
    query, key = rows(8), rows(8, seed=1)
    ops.patch_nce_loss(query, key.detach()).sum().backward()
    assert query.grad is not None and key.grad is None
    ops.patch_nce_loss(query.detach(), key).sum().backward()
    assert key.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precisions_are_computed_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    query, key = (rows(32, 16, seed, torch.float32).detach().to(dtype) for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, normalised = ops.patch_nce_loss(query, key), ops.l2_normalize(query)
    exact = ops.patch_nce_loss(query.double(), key.double())
    assert loss.dtype == normalised.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_have_finite_losses_and_gradients() -> None:
    query, key = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8)
    loss = ops.patch_nce_loss(query, key)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.full((4,), math.log(4)))
    assert query.grad is not None and query.grad.isfinite().all()


@pytest.mark.parametrize("diagonal", [None, -10.0])
def test_a_row_of_zeros_has_no_gradient_even_without_eps(diagonal: float | None) -> None:
    query, key = rows(6).detach(), rows(6, seed=1).detach()
    query[2], key[4] = 0, 0
    query.requires_grad_(), key.requires_grad_()
    loss = ops.patch_nce_loss(query, key, eps=0.0, diagonal=diagonal)
    loss.sum().backward()
    assert loss.isfinite().all()
    for grad, zeros in ((query.grad, 2), (key.grad, 4)):
        assert grad is not None and grad.isfinite().all()
        assert [bool(row.any()) for row in grad] == [number != zeros for number in range(6)]
    assert not ops.l2_normalize(torch.zeros(2, 3), eps=0.0).any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if torch.is_tensor(leaf)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_the_reference_makes_no_tensor_of_rows_by_rows_by_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2I_DIST_OPS", "reference")
    count, dim = 64, 16
    query, key = rows(count, dim), rows(count, dim, seed=1)
    with LargestTensor() as watch:
        ops.patch_nce_loss(query, key, diagonal=-10.0).sum().backward()
    assert count * count <= watch.elements < 2 * count * count
    with LargestTensor() as watch:
        papers_form(query, key, 1, 0.07)
    assert watch.elements == count * count * dim


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": torch.ones(2, 3, 4)}, r"query has shape \[2, 3, 4\]"),
        ({"key": torch.ones(6, 5)}, r"must be \[Nq, C\] and \[Nk, C\]"),
        ({"key": torch.ones(6, 4).double()}, "must have the same dtype"),
        ({"key": torch.ones(6, 4, device="meta")}, "move them to one device"),
        ({"groups": 4}, "cannot be cut into groups=4"),
        ({"groups": 0}, "groups=0"),
        ({"key_offset": 1}, "key_offset=1 places the positives of 6 rows at keys 1 to 6"),
        ({"key_offset": -1}, "key_offset=-1"),
        ({"temperature": 0.0}, "temperature=0.0 must be >= 1e-6"),
        ({"eps": -1.0}, "eps=-1.0 must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.patch_nce_loss(**{"query": torch.ones(6, 4), "key": torch.ones(6, 4), **change})


def test_integers_are_not_normalised() -> None:
    with pytest.raises(ValueError, match=r"torch.int64; l2_normalize needs"):
        ops.l2_normalize(torch.ones(2, 3, dtype=torch.long))
