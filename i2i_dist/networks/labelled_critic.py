"""The critic of StarGAN and MatchGAN: is a picture real, what does it show, and do two of them show the same."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Matching = Literal["joined", "difference"]


class Reading(NamedTuple):
    """What a critic reads off pictures [N, 3, S, S].

    Attributes:
        patches: [N, 1, h, w], a value for each place of the last map; large means real.
        classes: [N, L], a logit for each attribute.
        matches: [P, 2], for each pair asked about the logits of "they show something else" and "the same"; or None.
    """

    patches: Tensor
    classes: Tensor
    matches: Tensor | None


class LabelledCritic(nn.Module):
    """Halving 4x4 convolutions with leaky ReLU 0.01 and no norm; one head for each question.

    44,762,048 parameters at the defaults, 44,794,816 with the head for pairs. The heads for labels and pairs are
    convolutions as large as the last map, so that the critic takes pictures of one size.

    Args:
        attributes: L, numbers of a label.
        image_size: S, side of the pictures; a multiple of 2**layers.
        width: Channels of the first convolution; each has twice as many as the one before.
        layers: Number of halvings.
        matching: What the head for pairs reads: the features of both pictures "joined", side by side, of which it is a
            sum; or their absolute "difference". None for no such head.

    Source: Choi et al. 2018, appendix on the architecture; Sun et al. 2020 for joined pairs.
    """

    def __init__(
        self,
        *,
        attributes: int = 5,
        image_size: int = 128,
        width: int = 64,
        layers: int = 6,
        matching: Matching | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        widths = [3, *(width * 2**layer for layer in range(layers))]
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in itertools.pairwise(widths)
        )
        deep, last = widths[-1], image_size // 2**layers
        self.to_patches = nn.Conv2d(deep, 1, 3, padding=1, bias=False)
        self.to_classes = nn.Conv2d(deep, attributes, last, bias=False)
        self.matching = matching
        joined = matching == "joined"
        # Where there is no difference, the bias is left to say that.
        self.to_match = nn.Conv2d(2 * deep if joined else deep, 2, last, bias=not joined) if matching else None

    def forward(self, image: Tensor, pairs: Tensor | None = None) -> Reading:
        """Read.

        Args:
            image: `[N, 3, S, S]` in [-1, 1].
            pairs: int64 `[P, 2]`, rows of `image` to be compared; the order within a pair matters.

        Raises:
            ValueError: For pictures of another size.
        """
        side = self.image_size
        if image.shape[-2:] != (side, side):
            raise ValueError(
                f"the critic was given images of {image.size(-2)} x {image.size(-1)}; its heads are made for "
                f"{side} x {side}. Train with crops of that size, or set method.image_size to the size of the crops."
            )
        x = image
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.01, inplace=True)
        matches = None
        if self.to_match is not None and pairs is not None:
            first, second = (x[rows] for rows in pairs.to(x.device, non_blocking=True).unbind(1))
            both = torch.cat([first, second], 1) if self.matching == "joined" else (first - second).abs()
            matches = self.to_match(both).flatten(1)
        return Reading(self.to_patches(x), self.to_classes(x).flatten(1), matches)
