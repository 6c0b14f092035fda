"""Heat maps as pictures: dark violet by way of red to light yellow, equally far apart to the eye."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

_COLOURS = 256


def heat_map_pictures(maps: Tensor, covered: tuple[int, int], shown: tuple[int, int]) -> Tensor:
    """Enlarge heat maps to the size of their images and colour them, each by its own least and greatest value.

    What is not finite counts as 0, and a map that is the same everywhere becomes a picture of the darkest colour.

    Args:
        maps: Floating [N, 1, h, w], of any scale.
        covered: Height and width of the image that they lie over, padding included.
        shown: Height and width of the part of it, at the top left, that is wanted.

    Returns:
        float32 [N, 3, *shown] in [-1, 1], on the device of the maps.
    """
    finite = maps.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    values = F.interpolate(finite, size=covered, mode="bilinear", align_corners=False)[:, 0, : shown[0], : shown[1]]
    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    scaled = (values - low) / torch.where(high > low, high - low, 1.0)
    places = (scaled * (_COLOURS - 1)).round().long()
    return colours().to(maps.device)[places].permute(0, 3, 1, 2) * 2.0 - 1.0


@functools.cache
def colours() -> Tensor:
    """Return the colour map, float32 [256, 3] of sRGB in [0, 1].

    It is a path through OKLab (Ottosson, 2020), where distances are those that people see: lightness rises evenly, so
    that the map also reads in grey, while the hue turns from violet by way of red to yellow.
    """
    place = torch.linspace(0.0, 1.0, _COLOURS, dtype=torch.float64)
    lightness, hue = 0.18 + 0.77 * place, math.radians(-70.0) + math.radians(175.0) * place
    chroma = 0.11 + 0.085 * torch.sin(math.pi * place) - 0.03 * place
    lab = torch.stack([lightness, chroma * torch.cos(hue), chroma * torch.sin(hue)], dim=1)
    to_cones = [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    cones = (lab @ torch.tensor(to_cones, dtype=torch.float64).T) ** 3
    linear = (cones @ torch.tensor(to_linear, dtype=torch.float64).T).clamp(0.0, 1.0)
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded.float()
