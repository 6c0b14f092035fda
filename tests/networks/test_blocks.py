"""The fixed filters are the ones of the papers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.networks.blocks import BlurDownsample, ResidualBlock, upsample


def impulse(size: int, at: int) -> Tensor:
    image = torch.zeros(1, 1, size, size, dtype=torch.float64)
    image[0, 0, at, at] = 1
    return image


def test_blur_answers_an_impulse_with_its_filter() -> None:
    blur = BlurDownsample(1).double()
    on_grid, off_grid = blur(impulse(16, 8))[0, 0], blur(impulse(16, 7))[0, 0]
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[4, 4] = 0.25
    assert torch.equal(on_grid, expected)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[3:5, 3:5] = 1 / 16
    assert torch.equal(off_grid, expected)


def test_blur_follows_its_formula_with_reflected_edges() -> None:
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    index = [torch.arange(-1, size + 1).abs() for size in (8, 10)]
    index = [torch.where(i >= size, 2 * size - 2 - i, i) for i, size in zip(index, (8, 10), strict=True)]
    padded = x[:, :, index[0]][:, :, :, index[1]]
    rows = (padded[:, :, 0:-2:2] + 2 * padded[:, :, 1:-1:2] + padded[:, :, 2::2]) / 4
    expected = (rows[..., 0:-2:2] + 2 * rows[..., 1:-1:2] + rows[..., 2::2]) / 4
    torch.testing.assert_close(BlurDownsample(3).double()(x), expected)


def test_blur_rounds_odd_sizes_up_and_saves_nothing() -> None:
    blur = BlurDownsample(4)
    assert blur(torch.randn(1, 4, 255, 63)).shape == (1, 4, 128, 32)
    assert not blur.state_dict() and not list(blur.parameters())


def test_upsample_of_a_ramp_and_an_impulse() -> None:
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4])
    torch.testing.assert_close(upsample(ramp)[0, 0, 3], expected)
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=torch.float64)
    answer = upsample(impulse(8, 4))[0, 0]
    assert torch.equal(answer[7:11, 7:11], torch.outer(taps, taps))
    assert answer.sum() == 4


def test_upsample_equals_the_transposed_convolution() -> None:
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = (4 * torch.outer(taps, taps)).repeat(3, 1, 1, 1)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    whole = F.conv_transpose2d(padded, kernel, stride=2, padding=2, groups=3)
    torch.testing.assert_close(upsample(x), whole[:, :, 1:-1, 1:-1])


def test_residual_block_has_no_activation_after_the_sum() -> None:
    block = ResidualBlock(4)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(block(x), x)
