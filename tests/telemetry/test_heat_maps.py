"""Heat maps become pictures: the colours say how much, the place says where."""

from __future__ import annotations

import pytest
import torch

from i2i_dist.telemetry.heat_maps import colours, heat_map_pictures
from i2i_dist.telemetry.samples import to_uint8


def lightness(srgb: torch.Tensor) -> torch.Tensor:
    """CIE L* of sRGB in [0, 1], read from the standards and not from the code."""
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722])
    return torch.where(luminance > 216 / 24389, 116 * luminance ** (1 / 3) - 16, luminance * 24389 / 27)


def test_the_colours_get_lighter_evenly() -> None:
    table = colours()
    assert table.shape == (256, 3) and float(table.min()) >= 0 and float(table.max()) <= 1
    values = lightness(table)
    steps = values.diff()
    assert values[0] < 10 and values[-1] > 90
    assert float(steps.min()) > 0.1 and float(steps.max()) < 0.6  # 0.35 each would be perfectly even


def test_least_and_greatest_value_of_each_map_take_the_end_colours() -> None:
    low, high = (2 * colours()[end] - 1 for end in (0, -1))
    maps = torch.tensor([[0.0, 1.0], [0.5, 0.5]])[None, None]
    both = heat_map_pictures(torch.cat([maps, 1e6 - 1e3 * maps]), (8, 12), (8, 12))
    assert both.shape == (2, 3, 8, 12) and both.dtype == torch.float32
    for picture, corners in zip(both, [(low, high), (high, low)], strict=True):
        assert torch.allclose(picture[:, 0, 0], corners[0]) and torch.allclose(picture[:, 0, -1], corners[1])
    ramp = heat_map_pictures(torch.linspace(-3, 5, 256)[None, None, None], (1, 256), (1, 256))
    assert torch.allclose(ramp[0, :, 0], 2 * colours().T - 1)


def test_what_is_cropped_away_has_no_say_in_the_colours() -> None:
    maps = torch.tensor([[0.0, 1.0, 900.0], [0.0, 1.0, 900.0]])[None, None]
    picture = heat_map_pictures(maps, (2, 3), (1, 2))
    assert picture.shape == (1, 3, 1, 2)
    assert torch.allclose(picture[0, :, 0].T, 2 * colours()[[0, -1]] - 1)


@pytest.mark.parametrize("value", [0.0, -7.5, 3e38, float("nan"), float("inf")])
def test_a_map_without_differences_is_even(value: float) -> None:
    picture = heat_map_pictures(torch.full((1, 1, 4, 4), value), (16, 16), (16, 16))
    assert torch.allclose(picture, (2 * colours()[0] - 1)[None, :, None, None].expand(1, 3, 16, 16))
    assert len(set(to_uint8(picture).reshape(-1, 3).tolist()[0])) > 1  # violet, so that it is seen to be a map


def test_maps_in_bf16_are_taken() -> None:
    maps = torch.arange(4, dtype=torch.bfloat16).view(1, 1, 2, 2)
    expected = heat_map_pictures(maps.float(), (4, 4), (4, 4))
    assert torch.equal(heat_map_pictures(maps, (4, 4), (4, 4)), expected)
