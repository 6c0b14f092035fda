"""Parameter counts, shapes, receptive fields, taps and initialisation of the networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from i2i_dist.networks.batch_norm import BatchNorm
from i2i_dist.networks.init import initialise
from i2i_dist.networks.patchgan import PatchGAN
from i2i_dist.networks.projection import ProjectionHead, take
from i2i_dist.networks.resnet import ResNetGenerator, check_tap

CUT_TAPS = ("rgb", "down1", "down2", "block1", "block5")


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [({}, 11_378_179), ({"antialias": False}, 11_378_179), ({"blocks": 6}, 7_837_699), ({"blocks": 4}, 5_477_379)],
)
def test_generator_parameters(arguments: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        assert count(ResNetGenerator(**arguments)) == parameters


def test_discriminator_and_head_parameters() -> None:
    with torch.device("meta"):
        assert count(PatchGAN()) == count(PatchGAN(antialias=False)) == 2_764_737
        generator = ResNetGenerator()
        assert count(ProjectionHead(generator.tap_channels(CUT_TAPS[1:]))) == 493_568
        assert count(ProjectionHead(generator.tap_channels(CUT_TAPS))) == 560_384


@pytest.mark.parametrize("antialias", [True, False])
def test_generator_shapes_at_256(antialias: bool) -> None:
    with torch.device("meta"):
        generator = ResNetGenerator(antialias=antialias)
        image, features = generator(torch.empty(2, 3, 256, 256), taps=CUT_TAPS)
    sides = (262, 256, 128, 64, 64) if antialias else (262, 128, 64, 64, 64)
    channels = (3, 128, 256, 256, 256)
    assert image is not None and image.shape == (2, 3, 256, 256)
    assert [f.shape for f in features] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert generator.tap_channels(CUT_TAPS) == channels


@pytest.mark.parametrize("antialias", [True, False])
def test_discriminator_shapes(antialias: bool) -> None:
    with torch.device("meta"):
        critic = PatchGAN(antialias=antialias)
        assert critic(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)
        assert critic(torch.empty(1, 3, 24, 24)).shape == (1, 1, 1, 1)
        assert PatchGAN(layers=2)(torch.empty(1, 3, 12, 12)).shape == (1, 1, 1, 1)
        assert [stage.out_channels for stage in PatchGAN(layers=5).stages] == [64, 128, 256, 512, 512, 512]


def seen_columns(value: Tensor, image: Tensor) -> int:
    """Return how wide a stretch of `image` [1, C, H, W] the middle pixel of `value` [1, C, h, w] depends on."""
    middle = value[0, :, value.size(2) // 2, value.size(3) // 2].sum()
    [gradient] = torch.autograd.grad(middle, image, retain_graph=True)
    columns = gradient.abs().sum((0, 1, 2)).nonzero().flatten()
    return int(columns[-1] - columns[0] + 1)


@pytest.fixture
def no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instance norm and the rectifiers let every pixel see every other or none: leave the linear layers only."""

    def linear(x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return x.clone() if residual is None else x + residual

    for module in ("blocks", "resnet", "patchgan"):
        monkeypatch.setattr(f"i2i_dist.networks.{module}.instance_norm_act", linear)


@pytest.mark.usefixtures("no_norm")
def test_receptive_fields_of_the_taps() -> None:
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    _, features = ResNetGenerator(width=4)(image, taps=CUT_TAPS, encode_only=True)
    assert [seen_columns(f, image) for f in features] == [1, 9, 15, 35, 99]


@pytest.mark.usefixtures("no_norm")
@pytest.mark.parametrize(("antialias", "field"), [(True, 84), (False, 70)])
def test_receptive_field_of_the_discriminator(antialias: bool, field: int) -> None:
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    assert seen_columns(PatchGAN(width=4, antialias=antialias)(image), image) == field


@pytest.mark.parametrize("antialias", [True, False])
def test_taps_are_raw_in_order_and_never_overwritten(antialias: bool) -> None:
    torch.manual_seed(0)
    generator = ResNetGenerator(width=4, blocks=2, antialias=antialias)
    image = torch.randn(2, 3, 16, 24)
    original = image.clone()
    names = ("block2", "rgb", "down2", "down1", "block1", "rgb")
    translated, features = generator(image, taps=names)
    assert torch.equal(image, original) and translated.shape == image.shape and translated.abs().max() <= 1
    for name, feature in zip(names, features, strict=True):
        nothing, [alone] = generator(image, taps=(name,), encode_only=True)
        assert nothing is None
        torch.testing.assert_close(feature, alone, rtol=0, atol=0)
    assert features[3].min() < 0 and features[2].min() < 0
    assert torch.equal(features[1][:, :, 3:-3, 3:-3], image)


def test_encoding_stops_after_the_last_tap() -> None:
    generator = ResNetGenerator(width=4, blocks=3)
    ran: list[int] = []
    for number, block in enumerate(generator.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    generator(torch.randn(1, 3, 8, 8), taps=("block2", "down1"), encode_only=True)
    assert ran == [1, 2]


def test_all_parameters_of_the_generator_learn() -> None:
    generator = ResNetGenerator(width=4, blocks=2)
    image, features = generator(torch.randn(1, 3, 16, 16), taps=("down2",))
    (image.square().sum() + features[0].sum()).backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_generator_refuses_what_does_not_fit() -> None:
    generator = ResNetGenerator(width=4, blocks=2)
    with pytest.raises(ValueError, match=r"16 x 18; .* multiples of 4, at least 8\. Pad them to 16 x 20"):
        generator(torch.randn(1, 3, 16, 18))
    with pytest.raises(ValueError, match="Pad them to 8 x 8"):
        generator(torch.randn(1, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"'block3'; allowed is rgb, down1, down2, block1 to block2; did you mean 'block"
    ):
        generator(torch.randn(1, 3, 16, 16), taps=("block3",))
    with pytest.raises(ValueError, match=r"at least 24 x 24"):
        PatchGAN(width=4)(torch.randn(1, 3, 23, 64))


def test_taps_are_checked_without_a_list_of_them() -> None:
    for name in ("rgb", "down1", "down2", "block1", "block100000000"):
        check_tap(name, 10**8)
    with pytest.raises(ValueError, match=r"allowed is rgb, down1, down2, block1 to block10+; did you mean 'down1'\?$"):
        check_tap("dwn1", 10**300)
    with pytest.raises(ValueError, match=r"block1 to block5$"):
        check_tap("xyz", 5)
    for name in ("block6", "block0", "block01", "block-1", "block²", "block1\n", "block" + "9" * 5000, "", "RGB"):
        with pytest.raises(ValueError, match="no feature map is called"):
            check_tap(name, 5)


def test_take_picks_pixels_in_row_order_in_both_layouts() -> None:
    features = torch.randn(2, 5, 4, 6)
    ids = torch.tensor([7, 0, 23])
    expected = torch.stack([features[:, :, i // 6, i % 6] for i in ids.tolist()], dim=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = features.detach().contiguous(memory_format=layout).requires_grad_()
        taken = take(laid_out, ids)
        assert torch.equal(taken, expected)
        taken.sum().backward()
        assert laid_out.grad is not None and laid_out.grad.stride() == laid_out.stride()
        assert torch.equal(laid_out.grad.flatten(2).sum((0, 1)).nonzero().flatten(), ids.sort().values)


def test_projection_stays_in_fp32() -> None:
    head = ProjectionHead((3, 8), dim=16)
    initialise(head, "xavier", generator=torch.Generator().manual_seed(0))
    features = [torch.randn(2, 5, 3), torch.randn(2, 5, 8)]
    exact = head(features)
    assert [f.shape for f in exact] == [(2, 5, 16)] * 2
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = head(features)
    assert all(torch.equal(a, b) for a, b in zip(exact, under_autocast, strict=True))
    low = head.bfloat16()([f.bfloat16() for f in features])
    assert all(f.dtype == torch.float32 and f.abs().max() > 0 for f in low)
    with pytest.raises(ValueError, match="2 feature maps and was given 1"):
        head(features[:1])


@pytest.mark.parametrize("kind", ["xavier", "normal"])
def test_initialisation(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ConvTranspose2d(32, 64, 4), nn.Linear(256, 256), BatchNorm(4096))
    initialise(network, kind, generator=torch.Generator().manual_seed(0))
    for layer in network:
        assert isinstance(layer.bias, Tensor) and not layer.bias.any()
    for layer, fans in zip(network[:3], ((64 + 128) * 9, (32 + 64) * 16, 512), strict=True):
        deviation = 0.02 * math.sqrt(2 / fans) if kind == "xavier" else 0.02
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert network[3].weight.mean().item() == pytest.approx(1, abs=0.002)
    assert network[3].weight.std().item() == pytest.approx(0.02, rel=0.05)
    again = nn.Conv2d(64, 128, 3)
    initialise(again, kind, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.weight, network[0].weight)
    with pytest.raises(ValueError, match="use 'xavier', 'normal' or 'uniform'"):
        initialise(again, "orthogonal", generator=torch.Generator())


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(6, 8, 4), nn.Linear(30, 20)])
def test_the_uniform_initialisation_is_torchs_own(layer: nn.Module) -> None:
    initialise(layer, "uniform", generator=torch.Generator().manual_seed(0))
    given = {name: value.clone() for name, value in layer.named_parameters()}
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.allclose(value, given[name], rtol=1e-6) for name, value in layer.named_parameters())
