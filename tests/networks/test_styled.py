"""BicycleGAN's networks against the authors' nesting of them, and their counts, sizes and ways of the code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2i_dist.networks.multiscale import CriticsByKind, MultiscalePatchGAN
from i2i_dist.networks.style_encoder import StyleEncoder
from i2i_dist.networks.styled_unet import StyledUNetGenerator
from tests.networks import plain_styled as plain

STYLE = 3


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def filled(network: nn.Module) -> Any:
    """In fp64, with weights and biases of some size."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.double().parameters():
            spread = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread + 0.1 * (parameter.dim() == 1))
    return network


def small(**arguments: Any) -> Any:
    return filled(StyledUNetGenerator(**{"style_dim": STYLE, "width": 2, "downs": 6, **arguments}))


def image(height: int, width: int, channels: int = 3, images: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(images, channels, height, width, generator=draw, dtype=torch.float64) * 2 - 1


def codes(images: int = 2) -> Tensor:
    return torch.randn(images, STYLE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def masks(network: Any, height: int, width: int, images: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.rand(images, *shape, generator=draw) < 0.5 for shape in network.dropout_shapes(height, width)]


def assert_same_gradients(network: nn.Module, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Of both passes: the outputs, and the gradients of the same weighted sum of them."""

    def gradients(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        loss = torch.stack([(out * (out.detach() + 0.3)).mean() for out in outputs]).sum()
        return torch.autograd.grad(loss, list(network.parameters()))

    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12) and float(one.detach().std()) > 1e-3
    for (name, _), one, other in zip(network.named_parameters(), gradients(ours), gradients(theirs), strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * max(1.0, float(other.abs().max())), name
        assert other.abs().max() > 1e-12 or name.endswith("bias"), name


def test_parameters() -> None:
    with torch.device("meta"):
        assert count(StyledUNetGenerator()) == 54_794_627
        assert count(StyledUNetGenerator(in_channels=1)) == 54_792_579
        assert count(StyledUNetGenerator(downs=7)) == 42_145_155
        assert count(StyleEncoder()) == 2_590_032
        assert count(StyleEncoder(blocks=3)) == 1_344_080
        assert count(MultiscalePatchGAN()) == 3_458_978
        assert [count(scale) for scale in MultiscalePatchGAN().scales] == [2_764_737, 694_241]
        assert count(CriticsByKind(["encoded", "random"])) == 2 * 3_458_978


@pytest.mark.parametrize(
    ("downs", "places"),
    [(8, [(512, 4, 4), (512, 8, 8), (512, 16, 16)]), (7, [(512, 8, 8), (512, 16, 16)]), (6, [(512, 16, 16)]), (5, [])],
)
def test_places_of_dropout_and_shapes_at_256(downs: int, places: list[tuple[int, int, int]]) -> None:
    with torch.device("meta"):
        network = StyledUNetGenerator(downs=downs)
        assert network.dropout_shapes(256, 256) == places
        keep = [torch.empty(1, *place, dtype=torch.bool) for place in places]
        assert network(torch.empty(1, 3, 256, 256), torch.empty(1, 8), keep).shape == (1, 3, 256, 256)
        assert StyledUNetGenerator(downs=downs, dropout=0.0).dropout_shapes(256, 256) == []
        full, half = MultiscalePatchGAN()(torch.empty(2, 3, 256, 256))
        assert (full.shape, half.shape) == ((2, 1, 30, 30), (2, 1, 14, 14))


@pytest.mark.parametrize("downs", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("rate", [0.5, 0.2, 0.0])
def test_the_generator_computes_what_the_official_network_does(downs: int, rate: float) -> None:
    network, side = small(downs=downs, dropout=rate), 2**downs
    given, keep = image(side, 2 * side), masks(network, side, 2 * side)
    assert len(keep) == (max(0, downs - 5) if rate else 0)
    ours, theirs = network(given, codes(), keep), plain.unet(network, given, codes(), keep, rate)
    assert_same_gradients(network, [ours], [theirs])
    nothing_dropped = plain.unet(network, given, codes())
    assert torch.allclose(network(given, codes()), nothing_dropped, atol=1e-12)
    assert torch.allclose(ours, nothing_dropped, atol=1e-4) == (len(keep) == 0)


@pytest.mark.parametrize(("blocks", "height", "width"), [(1, 4, 4), (3, 16, 16), (3, 37, 50), (4, 32, 32)])
def test_the_encoder_computes_what_the_official_one_does(blocks: int, height: int, width: int) -> None:
    network, given = filled(StyleEncoder(style_dim=STYLE, width=4, blocks=blocks)), image(height, width)
    mean, logvar = plain.encode(network, given)
    assert logvar is not None
    assert_same_gradients(network, network(given), [mean, logvar])
    alone = filled(StyleEncoder(style_dim=STYLE, width=4, blocks=blocks, variance=False))
    assert alone(given).logvar is None
    assert [name for name, _ in network.named_parameters() if "logvar" in name] == [
        "to_logvar.weight",
        "to_logvar.bias",
    ]
    assert not any("logvar" in name for name, _ in alone.named_parameters())


@pytest.mark.parametrize(("scales", "layers", "side"), [(1, 3, 24), (2, 2, 32), (2, 3, 47), (3, 2, 48)])
def test_the_critic_computes_what_the_official_one_does(scales: int, layers: int, side: int) -> None:
    network = filled(MultiscalePatchGAN(in_channels=6, width=8, layers=layers, scales=scales))
    given = image(side, side + 9, channels=6)
    ours, theirs = network(given), plain.critic(network, given)
    assert len(ours) == scales and [scale.stages[0].out_channels for scale in network.scales] == [8, 4, 2][:scales]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert_same_gradients(network, [one.sum((2, 3)) for one in ours], [other.sum((2, 3)) for other in theirs])


def test_every_halving_reads_the_code() -> None:
    """Each level's own weights for the code, all others of its kind set to 0."""
    for level in range(6):
        network, given = small(), image(64, 64)
        with torch.no_grad():
            for other, down in enumerate(network.downs):
                if other != level:
                    down.weight[:, -STYLE:] = 0
        changed = network(given, codes() + torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        assert not torch.allclose(network(given, codes()), changed, atol=1e-6), level
        with torch.no_grad():
            network.downs[level].weight[:, -STYLE:] = 0
        assert torch.equal(network(given, codes()), network(given, codes() + 1)), "and no other way leads there"


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    network, encoder, given = small(), filled(StyleEncoder(width=4, blocks=3)), image(64, 128)
    together, encoded = network(given, codes()), encoder(given)
    for place in range(2):
        one = slice(place, place + 1)
        assert torch.allclose(network(given[one], codes()[one]), together[one], atol=1e-12)
        assert torch.allclose(encoder(given[one]).mean, encoded.mean[one], atol=1e-12)


def test_sizes_that_do_not_fit_are_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"64 x 100; with 6 halvings .* multiples of 64. Pad them to 64 x 128"):
        small()(image(64, 100), codes())
    with pytest.raises(ValueError, match=r"codes of shape \[2, 8\] for 2 images; .* \[2, 3\]"):
        small()(image(64, 64), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="was given 1 halvings; it needs at least 2"):
        StyledUNetGenerator(downs=1)
    with pytest.raises(ValueError, match="16 x 15; with 3 blocks they must be at least 16 x 16"):
        StyleEncoder(width=4, blocks=3)(torch.zeros(1, 3, 16, 15))
    critic = MultiscalePatchGAN(width=4)
    with pytest.raises(ValueError, match="64 x 46; with 2 scales of 3 layers they must be at least 47 x 47"):
        critic(torch.zeros(1, 3, 64, 46))
    assert [logits.shape for logits in critic(torch.zeros(1, 3, 47, 47))] == [(1, 1, 3, 3), (1, 1, 1, 1)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 192), (128, 64)])
def test_no_norm_ever_sees_a_single_pixel(height: int, width: int) -> None:
    """The smallest sizes that pass the checks also pass those of the norms, which refuse one pixel."""
    assert small()(image(height, width), codes()).shape == (2, 3, height, width)
