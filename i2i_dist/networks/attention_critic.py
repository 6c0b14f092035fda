"""U-GAT-IT's critics: spectral norm, attention before the logits, and two depths for each domain."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.attention import ClassActivation
from i2i_dist.networks.critics import DomainPair
from i2i_dist.networks.spectral_norm import SpectralConv2d, vectors


class Verdict(NamedTuple):
    """What a critic says of images [N, 3, H, W]; large means real.

    Attributes:
        patches: [N, 1, h, w], a logit for each overlapping patch.
        cam: [N, 2], the logits of its attention, from the mean and the maximum of each channel.
    """

    patches: Tensor
    cam: Tensor


class AttentiveCritic(nn.Module):
    """Reflect-padded 4x4 convolutions with spectral norm and leaky ReLU 0.2, attention, and a convolution to logits.

    There are `layers` - 2 halvings and one more convolution at stride 1, each but the first with twice the channels of
    the one before. Of the official depths, 7 has a receptive field of 286 x 286 and 53,130,176 parameters at the
    defaults, 5 one of 70 x 70 and 3,290,560.

    Args:
        width: Channels of the first convolution.
        layers: Counted as in the released code: all convolutions but the 1x1 one; at least 3.
        last_bias: The convolution to logits has a bias.
        cam_shared: See `ClassActivation`.
        cam_normalised: See `SpectralClassifier`.

    Source: Kim et al. 2020, section 2.1.2 and appendix A.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        layers: int = 7,
        last_bias: bool = False,
        cam_shared: bool = False,
        cam_normalised: bool = False,
    ) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(layers - 1)]
        strides = [2] * (layers - 2) + [1]
        self.layers, self.smallest = layers, 3 * 2 ** (layers - 2)
        self.stages = nn.ModuleList(
            _conv(before, after, stride=stride)
            for before, after, stride in zip([3, *widths[:-1]], widths, strides, strict=True)
        )
        self.cam = ClassActivation(
            widths[-1], shared=cam_shared, spectral=True, hands_out_normalised=cam_normalised, slope=0.2
        )
        self.to_patches = _conv(widths[-1], 1, bias=last_bias)

    def forward(self, image: Tensor) -> Verdict:
        """Judge `image` `[N, 3, H, W]` in [-1, 1]; ValueError unless H and W are at least 3 * 2**(layers - 2)."""
        height, width = image.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"the discriminator was given images of {height} x {width}; with {self.layers} layers they must be at "
                f"least {self.smallest} x {self.smallest}. Use larger images or fewer layers."
            )
        x = image
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2, inplace=True)
        x, cam = self.cam(x)
        return Verdict(self.to_patches(x), cam)


def _conv(before: int, after: int, *, stride: int = 1, bias: bool = True) -> SpectralConv2d:
    return SpectralConv2d(before, after, 4, stride, 1, bias=bias, padding_mode="reflect")


class Judged(NamedTuple):
    """What the four critics say of one set of images of both domains."""

    global_a: Verdict
    global_b: Verdict
    local_a: Verdict
    local_b: Verdict


class CriticInput(NamedTuple):
    """What the critics are asked in one turn of an update.

    Attributes:
        passes: The sets of images to be judged, one after the other: each moves the power iterations on by one.
        update: Any number that tells the update from the one before.
        turn: Whose turn it is in.
    """

    passes: tuple[DomainPair, ...]
    update: int
    turn: Literal["discriminator", "generator"]


class FourCritics(nn.Module):
    """A deep and a shallow critic for each domain.

    How far the power iterations move in a turn does not depend on how many micro-batches its images come in: each
    starts from the vectors that the turn began with, and so meets the weights that the whole batch would have met. What
    a turn began with is no part of the state: the next one begins with the vectors as they are.
    """

    def __init__(
        self,
        global_a: AttentiveCritic,
        global_b: AttentiveCritic,
        local_a: AttentiveCritic,
        local_b: AttentiveCritic,
    ) -> None:
        super().__init__()
        self.global_a, self.global_b = global_a, global_b
        self.local_a, self.local_b = local_a, local_b
        self._turn: tuple[int, str] | None = None
        self._began_with: list[Tensor] = []

    def forward(self, asked: CriticInput) -> tuple[Judged, ...]:
        """Judge every set of images in `asked.passes`."""
        if self.training:
            self._begin((asked.update, asked.turn))
        return tuple(
            Judged(self.global_a(a), self.global_b(b), self.local_a(a), self.local_b(b)) for a, b in asked.passes
        )

    @torch.no_grad()
    def _begin(self, turn: tuple[int, str]) -> None:
        now = list(vectors(self))
        if turn == self._turn:
            torch._foreach_copy_(now, self._began_with)
        else:
            self._turn, self._began_with = turn, [torch.empty_like(vector) for vector in now]
            torch._foreach_copy_(self._began_with, now)
