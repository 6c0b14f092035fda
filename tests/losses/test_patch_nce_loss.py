"""PatchNCE over layers: grouping, detached keys, and keys gathered over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from i2i_dist.losses.patch_nce import patch_nce

IMAGES, PLACES, DIM = 4, 6, 8


def layers(images: slice = slice(None)) -> tuple[list[Tensor], list[Tensor]]:
    """Return queries and keys of two layers, fp64, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, PLACES, DIM)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64)[images] for _ in range(4)]
    return [q.requires_grad_() for q in drawn[:2]], [k.requires_grad_() for k in drawn[2:]]


def test_mean_over_rows_and_layers_with_detached_keys() -> None:
    queries, keys = layers()
    loss = patch_nce(queries, keys)
    loss.backward()
    singles = [patch_nce([q[i : i + 1]], [k[i : i + 1]]) for q, k in zip(queries, keys, strict=True) for i in range(4)]
    torch.testing.assert_close(loss, torch.stack(singles).mean())
    assert all(q.grad is not None and q.grad.any() for q in queries)
    assert all(k.grad is None for k in keys)


def test_negatives_of_the_image_differ_from_those_of_the_batch() -> None:
    queries, keys = layers()
    per_image, whole = patch_nce(queries, keys), patch_nce(queries, keys, negatives="global_batch")
    assert whole > per_image + 0.1
    one_image = [q.flatten(0, 1)[None] for q in queries], [k.flatten(0, 1)[None] for k in keys]
    torch.testing.assert_close(whole, patch_nce(*one_image))


def test_bad_arguments_are_refused() -> None:
    queries, keys = layers()
    with pytest.raises(ValueError, match="queries of 2 layers and keys of 1"):
        patch_nce(queries, keys[:1])
    with pytest.raises(ValueError, match="at least one"):
        patch_nce([], [])
    with pytest.raises(ValueError, match=r"shapes \[4, 6, 8\] and \[2, 12, 8\]; all must be \[N, P, D\]"):
        patch_nce([queries[0], queries[1].reshape(2, 12, 8)], keys)
    with pytest.raises(ValueError, match=r"queries of shape \[4, 6, 8\] with keys of shape \[3, 6, 8\]"):
        patch_nce(queries[:1], [keys[0][:3]])
    with pytest.raises(ValueError, match="use 'image' or 'global_batch'"):
        patch_nce(queries, keys, negatives="batch")


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = IMAGES // 2
    queries, keys = layers(slice(rank * share, (rank + 1) * share))
    loss = patch_nce(queries, keys, negatives="global_batch")
    loss.backward()
    torch.save([loss.detach(), *(q.grad for q in queries)], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_with_gathered_keys_equal_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    queries, keys = layers()
    loss = patch_nce(queries, keys, negatives="global_batch")
    loss.backward()
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss.detach(), rtol=1e-12, atol=0)
    for layer, query in enumerate(queries, start=1):
        gathered = torch.cat([ranks[0][layer], ranks[1][layer]]) / 2
        torch.testing.assert_close(gathered, query.grad, rtol=1e-10, atol=1e-14)
