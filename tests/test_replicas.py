"""Which rank, and which tensor, is named where ranks no longer hold the same."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2i_dist import replicas
from i2i_dist.replicas import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.uint8]


def test_a_checksum_tells_any_bit_and_any_order() -> None:
    values = torch.arange(5.0)
    seen = {int(checksum(values)), int(checksum(values.flip(0))), int(checksum(torch.zeros(5)))}
    for place in range(5):
        for bit in range(32):
            other = values.clone()
            other.view(torch.int32)[place] ^= -(1 << 31) if bit == 31 else 1 << bit
            seen.add(int(checksum(other)))
    assert len(seen) == 3 + 5 * 32
    assert checksum(values.view(5, 1)) == checksum(values)
    halves = torch.tensor([0.0, 1.0]).repeat_interleave(replicas._CHUNK)
    assert checksum(halves) != checksum(halves.flip(0))
    assert (replicas._weights(1000, values.device) % 2 == 1).all()  # else a highest bit might count for nothing


def test_a_checksum_tells_constants_of_any_length_apart() -> None:
    """A sum modulo two would be the same for even lengths, and one by 1, 3, 5 and so on for powers of two."""
    for length in (2, 64, 1 << 16, (1 << 20) + 2, 3 << 20):
        assert len({int(checksum(torch.full((length,), value))) for value in (0.0, 1.0, -1.0)}) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_kind_of_tensor_has_a_checksum(dtype: torch.dtype) -> None:
    ones = torch.ones(3, 2, dtype=dtype)
    assert checksum(ones.T) == checksum(ones.T.contiguous()) != checksum(torch.zeros(3, 2, dtype=dtype))
    assert checksum(ones[0, 0]) != checksum(torch.zeros((), dtype=dtype))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)


def named(monkeypatch: pytest.MonkeyPatch, ranks: list[Any]) -> list[str | None]:
    """Return what each of these ranks says of all of them."""
    layout = SimpleNamespace(stage=0)
    every: Any = [{"generator": SimpleNamespace(module=module, layout=layout)} for module in ranks]

    def rows(values: Tensor) -> Tensor:
        sums = [torch.stack([checksum(t) for _, t in replicas.replicated(sides["generator"])]) for sides in every]
        if len(values) == len(sums[0]):
            return torch.stack(sums)
        return torch.stack([checksum(one).reshape(1) for one in sums])

    monkeypatch.setattr(replicas, "gather_numbers", rows)
    monkeypatch.setattr(replicas, "gather_texts", lambda text: [f"host{rank}" for rank in range(len(ranks))])
    return [replicas.difference(sides) for sides in every]


def test_the_rank_that_is_unlike_the_others_is_named_with_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [copy.deepcopy(module) for module in [Small()] * 7]
    for rank, module in enumerate(ranks):
        module.passing.fill_(rank)  # what is in no checkpoint may be a rank's own
    assert named(monkeypatch, ranks) == [None] * 7
    ranks[5].second.bias.data[2] += 1.0
    ranks[5].kept[0] = 3.0
    said = "the generator's second.bias is not the same on all ranks: "
    assert named(monkeypatch, ranks) == [said + "rank 5 (host5) differs from the other 6"] * 7
    ranks[2].second.bias.data[2] -= 1.0
    assert named(monkeypatch, ranks) == [said + "ranks 2 (host2) and 5 (host5) differ from the other 5"] * 7
    for rank in (0, 1):
        ranks[rank].second.bias.data[2] -= 1.0 + rank
    two = "ranks 0 (host0), 1 (host1), 2 (host2), 3 (host3) and 3 more differ, and no majority tells which is right"
    assert named(monkeypatch, ranks) == [said + two] * 7
