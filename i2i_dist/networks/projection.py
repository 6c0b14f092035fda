"""Features sampled by location, and the projection head that maps them to the space of the contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist import ops
from i2i_dist.ops.precision import outside_autocast


def take(features: Tensor, ids: Tensor) -> Tensor:
    """Sample a feature map at locations; the one way in which features are sampled.

    Args:
        features: `[N, C, H, W]`.
        ids: int64 `[P]`, each `row * W + column` of the whole map, on any device; shared by the images of the batch.

    Returns:
        `[N, P, C]` in the dtype of `features`.
    """
    return ops.patch_gather(features, ids.to(features.device, non_blocking=True))


class ProjectionHead(nn.Module):
    """One two-layer perceptron for each feature map: C_l -> dim -> dim with a ReLU between, built eagerly.

    The outputs are raw: the contrastive loss normalises them. They are computed in fp32 whatever the precision of
    the rest, because at initialisation (gain 0.02) their squares lie below what fp16 can hold.

    Args:
        channels: Channel count of each feature map.
        dim: Size of the projected features.

    Source: Park et al. 2020, section 3.2 (the two-layer H_l).
    """

    def __init__(self, channels: Sequence[int], dim: int = 256) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(ExactLinear(c, dim), nn.ReLU(inplace=True), ExactLinear(dim, dim)) for c in channels
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Project sampled features.

        Args:
            features: For each feature map `[N, P, C_l]`, in the order of `channels`.

        Returns:
            For each feature map `[N, P, dim]`, fp32 (fp64 if either the features or the weights are).

        Raises:
            ValueError: If the number of feature maps differs from the number of heads.
        """
        if len(features) != len(self.heads):
            raise ValueError(
                f"the projection head was built for {len(self.heads)} feature maps and was given {len(features)}; "
                f"tap the same layers that it was built with."
            )
        return tuple(head(x) for head, x in zip(self.heads, features, strict=True))


def project(head: ProjectionHead, features: Sequence[Tensor], ids: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Sample each feature map `[N, C_l, H, W]` at its own ids `[P_l]`, and project: for each `[N, P_l, dim]`."""
    projected: tuple[Tensor, ...] = head([take(x, places) for x, places in zip(features, ids, strict=True)])
    return projected


class ExactLinear(nn.Linear):
    """A linear layer that computes in fp32 or better, under autocast and with low-precision weights too."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., in_features]` to `[..., out_features]`, fp32 (fp64 if either `x` or the weights are)."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with outside_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
