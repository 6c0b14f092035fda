"""The U-Net against the authors' nesting of it, and its counts, shapes and places of dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.unet import UNetGenerator
from tests.networks import plain


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def small(**arguments: Any) -> UNetGenerator:
    """In fp64, with weights and biases of some size."""
    network = UNetGenerator(**{"width": 2, "downs": 6, **arguments}).double()
    fill(network)
    return network


def fill(network: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread + (parameter.dim() == 1))


def image(height: int, width: int, channels: int = 3, images: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(images, channels, height, width, generator=draw, dtype=torch.float64) * 2 - 1


def masks(network: UNetGenerator, height: int, width: int, images: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.rand(images, *shape, generator=draw) < 0.5 for shape in network.dropout_shapes(height, width)]


def test_parameters() -> None:
    with torch.device("meta"):
        assert count(UNetGenerator()) == 54_413_955
        assert count(UNetGenerator(downs=7)) == 41_828_995
        assert count(PatchGAN(in_channels=6, antialias=False, norm="batch")) == 2_768_705


def test_biases_are_where_the_official_code_has_them() -> None:
    assert [name for name, _ in small().named_parameters() if name.endswith("bias") and "norms" not in name] == [
        "to_image.bias"
    ]
    # As wide as its input has channels, the second stage must not be taken for the first.
    critic = PatchGAN(in_channels=6, width=6, antialias=False, norm="batch")
    assert [name for name, _ in critic.named_parameters() if name.endswith("bias") and "norms" not in name] == [
        "stages.0.bias", "to_logits.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("downs", "places"),
    [(8, [(512, 4, 4), (512, 8, 8), (512, 16, 16)]), (7, [(512, 8, 8), (512, 16, 16)]), (6, [(512, 16, 16)]), (5, [])],
)
def test_places_of_dropout(downs: int, places: list[tuple[int, int, int]]) -> None:
    with torch.device("meta"):
        network = UNetGenerator(downs=downs)
        assert network.dropout_shapes(256, 256) == places
        keep = [torch.empty(1, *place, dtype=torch.bool) for place in places]
        assert network(torch.empty(1, 3, 256, 256), keep).shape == (1, 3, 256, 256)
        assert UNetGenerator(downs=downs, dropout=0.0).dropout_shapes(256, 256) == []


@pytest.mark.parametrize("downs", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("rate", [0.5, 0.2, 0.0])
def test_it_computes_what_the_official_network_does(downs: int, rate: float) -> None:
    network, side = small(downs=downs, dropout=rate), 2**downs
    given, keep = image(side, 2 * side), masks(network, side, 2 * side)
    assert len(keep) == (max(0, downs - 5) if rate else 0)
    ours, theirs = network(given, keep), plain.unet(network, given, keep, rate)
    assert torch.allclose(ours, theirs, atol=1e-12) and float(ours.detach().std()) > 0.01
    target = image(side, 2 * side).flip(0)
    for_ours = torch.autograd.grad((ours - target).abs().mean(), list(network.parameters()))
    for_theirs = torch.autograd.grad((theirs - target).abs().mean(), list(network.parameters()))
    for one, other in zip(for_ours, for_theirs, strict=True):
        largest = float(other.abs().max())
        assert largest > 0 and float((one - other).abs().max()) < 1e-6 * largest


def test_the_conditional_critic_computes_what_the_official_one_does() -> None:
    critic = PatchGAN(in_channels=6, width=4, antialias=False, norm="batch").double()
    fill(critic)
    a, b = image(32, 40), image(32, 40).flip(0)
    ours, theirs = critic(torch.cat([a, b], 1)), plain.critic(critic, a, b)
    assert torch.allclose(ours, theirs, atol=1e-12) and float(ours.detach().std()) > 0.01
    for_ours = torch.autograd.grad(ours.square().mean(), list(critic.parameters()))
    for_theirs = torch.autograd.grad(theirs.square().mean(), list(critic.parameters()))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(for_ours, for_theirs, strict=True))


def test_a_mask_of_one_image_serves_all() -> None:
    network, given = small(), image(64, 64)
    [keep] = masks(network, 64, 64, images=1)
    assert torch.equal(network(given, [keep]), network(given, [keep.expand(2, -1, -1, -1)]))
    assert not torch.allclose(network(given, [keep]), network(given, [~keep]), atol=1e-3)


def test_statistics_reach_every_norm() -> None:
    network, given = small(dropout=0.0), image(64, 64)
    alone = torch.cat([network(one[None], []) for one in given])
    assert torch.allclose(network(given, [], "image"), alone, atol=1e-10)
    assert not torch.allclose(network(given, []), alone, atol=1e-2)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert not torch.allclose(network(given, [], "running"), alone, atol=1e-2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_sizes_that_do_not_fit_are_answered_with_those_that_do() -> None:
    network = small()
    with pytest.raises(
        ValueError, match=r"images of 64 x 100; with 6 halvings .* multiples of 64. Pad them to 64 x 128"
    ):
        network(image(64, 100), [])
    with pytest.raises(ValueError, match="was given 1 halvings; it needs at least 2"):
        UNetGenerator(downs=1)
