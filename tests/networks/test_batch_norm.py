"""Batch norm: one rank equals torch, two ranks equal one, and nothing that is not finite is remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.distributed import rank_and_world
from i2i_dist.networks.batch_norm import BatchNorm
from tests.ranks import run_ranks

BATCH, CHANNELS = 4, 5
FAR = 10_000.0  # a mean whose square leaves fp32 no digit for a variance of 1


def layer(dtype: torch.dtype) -> BatchNorm:
    draw = torch.Generator().manual_seed(0)
    norm = BatchNorm(CHANNELS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(CHANNELS, generator=draw) + 0.5)
        norm.bias.copy_(torch.randn(CHANNELS, generator=draw))
    return norm


def inputs(offset: float) -> tuple[Tensor, Tensor]:
    """A batch whose images differ in mean and size, and a gradient; multiples of 2^-8, exact in fp32 at any offset."""
    draw = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0])[:, None, None, None]
    x = torch.randn(BATCH, CHANNELS, 6, 7, generator=draw) * scale + scale
    gradient = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return (x * 256).round().double() / 256 + offset, gradient


def reference(offset: float, passes: int = 1) -> dict[str, Tensor]:
    """torch's own layer on the whole batch, in fp64."""
    norm = nn.BatchNorm2d(CHANNELS).double()
    ours = layer(torch.float64)
    with torch.no_grad():
        norm.weight.copy_(ours.weight)
        norm.bias.copy_(ours.bias)
    x, gradient = inputs(offset)
    x.requires_grad_()
    y = [norm(x * (number + 1)) for number in range(passes)]
    torch.stack(y).sum(0).backward(gradient)
    assert x.grad is not None
    found = {"y": y[-1], "to_x": x.grad, "to_weight": norm.weight.grad, "to_bias": norm.bias.grad}
    return {name: value.detach() for name, value in {**found, **dict(norm.named_buffers())}.items()}  # type: ignore


def distances(dtype: torch.dtype, offset: float, passes: int = 1) -> dict[str, float]:
    """The same on this rank's share of the batch, against it: relative to the largest value of each tensor."""
    rank, world = rank_and_world()
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    norm, (x, gradient) = layer(dtype), inputs(offset)
    own = x[mine].to(dtype).requires_grad_()
    y = [norm(own * (number + 1)) for number in range(passes)]
    torch.stack(y).sum(0).backward(gradient[mine].to(dtype))
    assert own.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    found = {"y": y[-1].detach(), "to_x": own.grad, "to_weight": norm.weight.grad, "to_bias": norm.bias.grad}
    assert all(value.dtype == dtype for value in found.values())
    for name in ("to_weight", "to_bias"):  # a rank has the gradients of its own images: the engines add them up
        if world > 1:
            torch.distributed.all_reduce(found[name])
    expected = reference(offset, passes)
    expected |= {name: expected[name][mine] for name in ("y", "to_x")}
    found |= {name: buffer.detach() for name, buffer in norm.named_buffers()}
    return {name: float(((found[name] - expected[name]).abs() / expected[name].abs().max()).max()) for name in found}


def two_ranks() -> dict[str, Any]:
    results: dict[str, Any] = {
        f"{dtype} {offset} {passes}": distances(dtype, offset, passes)
        for dtype in (torch.float32, torch.float64)
        for offset in (0.0, FAR)
        for passes in (1, 2)
        if passes == 1 or offset == 0.0
    }
    norm, (x, _) = layer(torch.float32), inputs(0.0)
    poisoned = x.float() if rank_and_world()[0] == 0 else x.float() * float("nan")
    normalised = norm(poisoned)
    results["a NaN of rank 1"] = (bool(normalised.isnan().all()), norm.running_mean.tolist(), norm.running_var.tolist())
    results["without a graph"] = two_ranks_without_a_graph()
    results["frozen"] = two_ranks_frozen()
    results["alone"] = on_one_rank_alone()
    return results


def two_ranks_without_a_graph() -> bool:
    """Under no_grad the numbers are those with a graph."""
    x = inputs(0.0)[0].float()[rank_and_world()[0] :: 2]
    with torch.no_grad():
        without = layer(torch.float32)(x)
    return torch.equal(without, layer(torch.float32)(x).detach()) and not without.requires_grad


def two_ranks_frozen() -> tuple[bool, bool]:
    """Frozen, the gradient to the images is that of the trained layer, and the layer collects none."""
    x, gradient = (value[rank_and_world()[0] :: 2] for value in inputs(0.0))
    to_x = []
    for frozen in (False, True):
        norm, own = layer(torch.float64).requires_grad_(not frozen), x.clone().requires_grad_()
        norm(own).backward(gradient)
        to_x.append(own.grad)
    assert to_x[0] is not None and to_x[1] is not None
    return torch.equal(to_x[0], to_x[1]), norm.weight.grad is None


def on_one_rank_alone() -> bool:
    """Other statistics than those of the batch wait for no other rank: rank 0 translates by itself."""
    if rank_and_world()[0] == 0:
        norm, (x, _) = layer(torch.float32), inputs(0.0)
        norm(x.float(), "image"), norm(x.float(), "running")
    return True


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = run_ranks(2, "tests.networks.test_batch_norm:two_ranks", tmp_path_factory.mktemp("ranks"))
    return first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("passes", [1, 2])
def test_two_ranks_equal_one(ranks: tuple[dict[str, Any], ...], dtype: torch.dtype, passes: int) -> None:
    for results in ranks:
        far_off = {name: value for name, value in results[f"{dtype} 0.0 {passes}"].items() if value > 1e-6}
        assert not far_off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_costs_no_digits(ranks: tuple[dict[str, Any], ...], dtype: torch.dtype) -> None:
    """What is left in fp32 is the rounding of the mean, 10,000 * 2^-24, beside a deviation of 1."""
    for results in ranks:
        assert max(results[f"{dtype} {FAR} 1"].values()) < (2e-3 if dtype == torch.float32 else 1e-9)


def test_what_is_not_finite_is_not_remembered(ranks: tuple[dict[str, Any], ...]) -> None:
    for all_nan, mean, variance in (results["a NaN of rank 1"] for results in ranks):
        assert all_nan
        assert mean == [0.0] * CHANNELS and variance == [1.0] * CHANNELS
    norm, (x, _) = layer(torch.float64), inputs(0.0)
    norm(x)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x[0, 0, 0, 0] = float("inf")
    norm(x)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])


def test_gradients_off_and_frozen(ranks: tuple[dict[str, Any], ...]) -> None:
    for results in ranks:
        assert results["without a graph"] is True
        assert results["frozen"] == (True, True)
        assert results["alone"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("passes", [1, 2])
def test_one_rank_equals_torch(dtype: torch.dtype, passes: int) -> None:
    assert max(distances(dtype, 0.0, passes).values()) < 1e-6


def test_training_mode_has_no_say() -> None:
    norm, (x, _) = layer(torch.float64), inputs(0.0)
    trained = norm.train()(x)
    assert torch.equal(norm.eval()(x), trained)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    running = norm.train()(x, "running")
    expected = F.batch_norm(x, mean, variance, norm.weight, norm.bias)
    assert torch.allclose(running, expected, atol=1e-12) and not torch.allclose(running, trained, atol=1e-3)
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


def test_statistics_of_an_image_are_its_own() -> None:
    norm, (x, _) = layer(torch.float64), inputs(0.0)
    together = norm(x, "image")
    for image, alone in zip(together, x, strict=True):
        assert torch.allclose(image, norm(alone[None], "image")[0], atol=1e-12)
        assert torch.allclose(image, norm(alone[None], "batch")[0], atol=1e-12)
    assert not torch.allclose(together, norm(x), atol=1e-2)


@pytest.mark.parametrize("statistics", ["batch", "image", "running"])
def test_half_precision_in_is_half_precision_out(statistics: Any) -> None:
    norm, (x, _) = layer(torch.float32), inputs(0.0)
    low = norm(x.bfloat16(), statistics)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), norm(x.bfloat16().float(), statistics), atol=0.02, rtol=0.01)


def test_single_values_and_unknown_statistics_are_refused() -> None:
    norm = BatchNorm(3)
    norm(torch.randn(2, 3, 1, 1))
    for x, statistics in ((torch.randn(1, 3, 1, 1), "batch"), (torch.randn(2, 3, 1, 1), "image")):
        with pytest.raises(ValueError, match="one value of each channel, which has no variance; use larger images"):
            norm(x, statistics)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use one of batch, image, running"):
        norm(torch.randn(2, 3, 4, 4), "all")  # type: ignore[arg-type]


def test_buffers_are_part_of_a_checkpoint() -> None:
    assert set(BatchNorm(3).state_dict()) == {"weight", "bias", "running_mean", "running_var"}
