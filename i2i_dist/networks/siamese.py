"""SimDCL's mapping network: what an encoder found in a whole image, as one short vector to be compared with others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist import ops
from i2i_dist.networks.projection import ExactLinear
from i2i_dist.ops.precision import outside_autocast


class MappingNet(nn.Module):
    """Projected features of all layers, seen as one image with a channel for each layer, to one unit vector.

    A 3x3 convolution with stride 2 and no padding, ReLU, the mean over all places, two linear layers with a ReLU
    between; 10,688 parameters at 4 layers. It computes in fp32 whatever the precision of the rest, because at
    initialisation (gain 0.02) its outputs have norms near the eps of the normalisation.

    Args:
        layers: Number of feature maps that were projected.
        dim: Size of the vector.

    Source: Han et al. 2021, appendix A.1.3; the released code normalises the vector, the text does not.
    """

    def __init__(self, layers: int, dim: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layers, dim, 3, stride=2)
        self.hidden = ExactLinear(dim, dim)
        self.to_vector = ExactLinear(dim, dim)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map each image's features to one vector.

        Args:
            features: For each layer `[N, P, D]`, raw projections of the same places of every image, P and D at least 3.

        Returns:
            `[N, dim]`, each row divided by (its norm + 1e-7), fp32 or fp64.

        Raises:
            ValueError: Layers of different shapes, or of fewer than 3 patches or dimensions.
        """
        shapes = [list(layer.shape) for layer in features]
        if any(shape != shapes[0] for shape in shapes) or min(shapes[0][1:]) < 3:
            raise ValueError(
                f"the mapping network was given layers of shapes {', '.join(map(str, shapes))}; all must be the same "
                f"[N, P, D] with P and D at least 3. A layer with fewer locations than patches has P = its locations: "
                f"ask for fewer patches, leave the layer out, or use larger images."
            )
        with outside_autocast(features[0]):
            stacked = torch.stack([ops.l2_normalize(layer, 1e-7) for layer in features], dim=1)  # [N, L, P, D]
            x = F.relu(self.conv(stacked)).mean((2, 3))
            return ops.l2_normalize(self.to_vector(F.relu(self.hidden(x))), 1e-7)
