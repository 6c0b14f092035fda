"""OP-GAN's siamese network: where the content of a patch lies, and which domains two patches are of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.ops import instance_norm_act

GRID = 3  # published: cells a side of the grid that a picture is cut into
CELLS = GRID * GRID
CELLS_OF_FOUR_PAIRS = 7  # two for D1, two for C2, one for C1, two for D2
_PLACES = 11  # published: places a side of the features of a patch
_EPS = 1e-6  # so that the root of no variance has a gradient
_SMALLEST_CELL = 9  # pixels a side; of a smaller one, three halvings leave a single place, which has no instance norm


class PatchPairs(NamedTuple):
    """Patches of pictures and of their translations, for P times the four situations of the paper.

    D1 is two patches of the source; D2 two of the translation; C1 one of each, from the same place; C2 one of each,
    from different places.

    Attributes:
        source: [P, 4, 3, h, w], the patches of D1, D1, C2, C1.
        translated: [P, 4, 3, h, w], those of C1, C2, D2, D2.
    """

    source: Tensor
    translated: Tensor


class Comparison(NamedTuple):
    """What the network says of P times four pairs.

    Attributes:
        source_maps: [P, 11, 11] in [0, 1], at least fp32: where the content of the source's patch of C1 lies.
        translated_maps: The same of the translation's patch.
        spreads: [P]: the standard deviation of the maps of the source's four patches, which lie at different places.
            The maps of two patches taken at random differ by twice its square.
        domains: [P, 4, 3], logits of the pairs D1, D2, C1, C2: both of A, both of B, one of each.
    """

    source_maps: Tensor
    translated_maps: Tensor
    spreads: Tensor
    domains: Tensor


def cut_pairs(source: Tensor, translated: Tensor, cells: Tensor) -> PatchPairs:
    """Cut out what the four situations need of pictures and of their translations, each patch once.

    Published: the grid of 3 x 3, and the situations. Reconstruction, for the paper's text is known to us only through a
    summary: a cell has floor(H / 3) x floor(W / 3) pixels, 85 x 85 at 256 x 256, the grid lies in the middle, and no
    cell is in two situations.

    Args:
        source: Pictures [N, 3, H, W].
        translated: Their translations, of the same shape; a cell is at the same pixels in both.
        cells: int64 [N, R, 7] on their device, in each row different numbers of cells: those of D1, D1, C2 in the
            source, of C1 in both, and of C2, D2, D2 in the translation.

    Returns:
        P = N * R times four pairs.

    Raises:
        ValueError: The pictures are smaller than 27 x 27.
    """
    return PatchPairs(_patches(source, cells[..., :4]), _patches(translated, cells[..., 3:]))


def _patches(images: Tensor, cells: Tensor) -> Tensor:
    """Return the cells [N, R, K] of images [N, C, H, W] as [N * R, K, C, h, w]."""
    height, width = images.shape[-2:]
    cell = height // GRID, width // GRID
    if min(cell) < _SMALLEST_CELL:
        raise ValueError(
            f"the siamese network was given images of {height} x {width}, of which a cell of the {GRID} x {GRID} grid "
            f"has {cell[0]} x {cell[1]} pixels; it must have {_SMALLEST_CELL} x {_SMALLEST_CELL}. Use images of at "
            f"least {GRID * _SMALLEST_CELL} x {GRID * _SMALLEST_CELL}."
        )
    top, left = (height - GRID * cell[0]) // 2, (width - GRID * cell[1]) // 2
    inner = images[:, :, top : top + GRID * cell[0], left : left + GRID * cell[1]]
    grid = inner.unflatten(3, (GRID, cell[1])).unflatten(2, (GRID, cell[0]))  # [N, C, row, h, column, w]
    grid = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [N, 9, C, h, w]
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    patches: Tensor = grid[samples, cells]
    return patches.flatten(0, 1)


class SiameseNet(nn.Module):
    """One encoder for all patches, a map of the content of each, and a classifier of the domains of two.

    Published: that the encoder is shared, and that a patch has content and domain features of 11 x 11 x 512 each.
    Reconstruction, for the paper's text is known to us only through a summary: all layers. Three convolutions with
    stride 2 make 11 x 11 of 85 x 85 exactly; other cells are averaged to it. The domain features have no instance norm
    of their own, which would take away what tells domains apart.

    It has 8,639,108 parameters at the default.

    Args:
        width: Channels of the first convolution; the features have 8 times as many.

    Source: Xie et al. 2020, equations 4 to 6.
    """

    spread: Tensor  # mean of `Comparison.spreads` in the last pass; watched, and no part of the state

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        features = 8 * width
        self.stem = nn.Conv2d(3, width, 7, padding=3)
        self.halvings = nn.ModuleList(
            nn.Conv2d(width * 2**number, width * 2 ** (number + 1), 3, stride=2, padding=1) for number in range(3)
        )
        self.content = nn.Conv2d(features, features, 3, padding=1)
        self.to_map = nn.Conv2d(features, 1, 1)
        self.domain = nn.Conv2d(features, features, 3, padding=1)
        self.pair = nn.Conv2d(2 * features, features // 2, 3, stride=2, padding=1)
        self.to_domains = nn.Linear(features // 2, 3)
        self.register_buffer("spread", torch.zeros(()), persistent=False)

    def forward(self, pairs: PatchPairs) -> Comparison:
        """Compare the patches of pairs."""
        # In passes of their own: in the generator's turn the source is constant, and its pass then leaves no graph.
        source, translated = self._encode(pairs.source), self._encode(pairs.translated)
        source_maps, translated_maps = self._maps(source), self._maps(translated[:, :1])
        spreads = (source_maps.var(1, correction=0).mean((1, 2)) + _EPS).sqrt()
        self.spread.copy_(spreads.detach().mean())
        logits = self._compared(self._domains(source), self._domains(translated))
        return Comparison(source_maps[:, 3], translated_maps[:, 0], spreads, logits)

    def _encode(self, patches: Tensor) -> Tensor:
        """Map patches [P, K, 3, h, w] to what both kinds of features are made of, [P, K, F, 11, 11]."""
        x = instance_norm_act(self.stem(patches.flatten(0, 1)), activation="relu")
        for halving in self.halvings:
            x = instance_norm_act(halving(x), activation="relu")
        return _grouped(F.adaptive_avg_pool2d(x, _PLACES), patches.size(1))

    def _maps(self, x: Tensor) -> Tensor:
        """Return the maps of the content [P, K, 11, 11], in [0, 1]."""
        logits = self.to_map(instance_norm_act(self.content(x.flatten(0, 1)), activation="relu"))
        exact: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _grouped(exact.sigmoid().squeeze(1), x.size(1))

    def _domains(self, x: Tensor) -> Tensor:
        """Return the domain features [P, K, F, 11, 11]."""
        return _grouped(F.leaky_relu(self.domain(x.flatten(0, 1)), 0.2), x.size(1))

    def _compared(self, source: Tensor, translated: Tensor) -> Tensor:
        """Return the logits of all pairs [P, 4, 3] from the domain features of their patches."""
        first = torch.stack([source[:, 0], translated[:, 2], source[:, 3], source[:, 2]], dim=1)
        second = torch.stack([source[:, 1], translated[:, 3], translated[:, 0], translated[:, 1]], dim=1)
        both = torch.cat([first, second], dim=2).flatten(0, 1)  # [4 P, 2 F, 11, 11]
        hidden = F.leaky_relu(self.pair(both), 0.2).mean((2, 3))
        return _grouped(self.to_domains(hidden), 4)


def _grouped(x: Tensor, patches: int) -> Tensor:
    return x.view(-1, patches, *x.shape[1:])
