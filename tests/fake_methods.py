"""Methods small enough to be reckoned by hand: one that tells where it looks, ones with codes, and with labels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.data.labels import LabelSpace
from i2i_dist.method import Direction, ParameterGroup


class _Gain(nn.Module):
    """A generator's side of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0]))


class _Fake:
    """What both have; training is not among it."""

    fakes: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ()
    multiple, group, pool_size, couples_batch = 8, 1, 0, False

    def __init__(self) -> None:
        self.generator, self.discriminator = _Gain(), _Gain()

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("generator", list(self.generator.parameters()), 1e-3, (0.5, 0.999))]


class Watching(_Fake):
    """Turns pictures into their negatives, from B darker ones, and looks at red: one value for each 4 x 4 pixels."""

    streams: ClassVar[tuple[str, ...]] = ("unpaired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b", "b_to_a")

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        return -image * self.generator.gain * (1.0 if direction == "a_to_b" else 0.5)

    def attend(self, image: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        return self.translate(image, direction), 10.0 * F.avg_pool2d(image[:, :1], 4)


class Coloured(_Fake):
    """Adds a code to the channels; the code of a picture is the mean of each channel."""

    streams: ClassVar[tuple[str, ...]] = ("paired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    style_dim = 3

    def __init__(self, encodes: bool = True) -> None:
        super().__init__()
        self.encodes = encodes

    def encode(self, image: Tensor) -> Tensor:
        assert self.encodes and image.shape[-1] % self.multiple == image.shape[-2] % self.multiple == 0
        return image.mean(dim=(2, 3))

    def translate_styled(self, image: Tensor, codes: Tensor) -> Tensor:
        assert codes.shape == (len(image), self.style_dim)
        return image * self.generator.gain * 0.5 + 0.1 * codes[:, :, None, None]

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        return self.translate_styled(image, image.new_zeros(len(image), self.style_dim))


class Edited(_Fake):
    """Adds to red what the labels weigh: 0.4 for the first attribute, 0.2 for the next, and so on."""

    streams: ClassVar[tuple[str, ...]] = ("labelled",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    labelled_fraction, labelled_group = 1.0, None

    def __init__(self, label_space: LabelSpace) -> None:
        super().__init__()
        self.label_space = label_space

    def translate_labelled(self, image: Tensor, labels: Tensor) -> Tensor:
        assert labels.shape == (len(image), len(self.label_space.attributes)) and labels.dtype == torch.float32
        weights = 0.8 * 0.5 ** torch.arange(1, labels.shape[1] + 1)
        red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
        return image * self.generator.gain * 0.5 + (labels @ weights)[:, None, None, None] * red

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        first = torch.from_numpy(self.label_space.classes[0]).float()
        return self.translate_labelled(image, first.expand(len(image), -1))


def as_method(fake: _Fake) -> Any:
    """Return a fake as the code under test takes it: as a Method, most of which it never asks for."""
    return fake
