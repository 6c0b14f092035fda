"""U-GAT-IT's attention: a classifier over pooled features whose weights then say how much each channel counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.networks.spectral_norm import SpectralLayer
from i2i_dist.ops.precision import outside_autocast


class Classifier(nn.Linear):
    """One logit for each image from its pooled channels, and the weights of the channels; fp32 or better throughout.

    With a bias, that is added to every weight handed out, as the TensorFlow code does.
    """

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Judge `pooled` `[N, C]`; return logits `[N, 1]` and weights `[C]`."""
        return self._judged(pooled, self.weight, self.weight)

    def _judged(self, pooled: Tensor, weight: Tensor, handed_out: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(pooled.dtype, weight.dtype), torch.float32)
        with outside_autocast(pooled):
            logits = F.linear(pooled.to(dtype), weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        # A new tensor: ZeRO 3 frees the parameter when this module is done.
        return logits, handed_out[0].clone() if self.bias is None else handed_out[0] + self.bias


class SpectralClassifier(SpectralLayer, Classifier):
    """The critics' classifier: the logits come from the normalised weight.

    The weights handed out are the raw ones, as in the PyTorch code; with `hands_out_normalised` they are the normalised
    ones, as in the TensorFlow code.
    """

    def __init__(self, channels: int, *, bias: bool, hands_out_normalised: bool) -> None:
        super().__init__(channels, 1, bias=bias)
        self.hands_out_normalised = hands_out_normalised

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Judge `pooled` `[N, C]`; return logits `[N, 1]` and weights `[C]`."""
        weight = self.normalised_weight()
        return self._judged(pooled, weight, weight if self.hands_out_normalised else self.weight)


class ClassActivation(nn.Module):
    """Class activation map: features whose channels are weighted by how they tell one domain from the other.

    A classifier judges the mean of each channel over the image, another one its maximum. The features times the weights
    of the one, and times those of the other, go through one 1x1 convolution and an activation. Gradients reach the
    classifiers by both ways.

    Args:
        channels: Channels of the features, C.
        shared: One classifier for mean and maximum, and with a bias (TensorFlow code); otherwise two without.
        spectral: The classifiers' weights are normalised (critics). A shared one moves on with each of its two uses.
        hands_out_normalised: See `SpectralClassifier`.
        slope: Of the activation for negative values: 0 is ReLU.

    Source: Kim et al. 2020, section 2.1.1; Zhou et al. 2016 for the map.
    """

    def __init__(
        self,
        channels: int,
        *,
        shared: bool = False,
        spectral: bool = False,
        hands_out_normalised: bool = False,
        slope: float = 0.0,
    ) -> None:
        super().__init__()

        def classifier() -> nn.Module:
            if spectral:
                return SpectralClassifier(channels, bias=shared, hands_out_normalised=hands_out_normalised)
            return Classifier(channels, 1, bias=shared)

        self.of_mean = classifier()
        self.of_max = None if shared else classifier()
        self.merge = _Merge(2 * channels, channels, 1)
        self.slope = slope

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh `x` `[N, C, H, W]`; return features of its shape, and logits `[N, 2]` of mean and maximum."""
        flat = x.flatten(2)
        mean_logits, mean_weights = self.of_mean(flat.mean(2))
        # max() and not amax(), which shares the gradient among equals: in bf16 there are many.
        max_logits, max_weights = (self.of_max or self.of_mean)(flat.max(2).values)
        merged = self.merge(x, mean_weights, max_weights)
        return F.leaky_relu(merged, self.slope, inplace=True), torch.cat([mean_logits, max_logits], dim=1)


class _Merge(nn.Conv2d):
    """A 1x1 convolution of the features weighted in two ways, one after the other in its input channels.

    The channels' weights are the same for all images, so they go into the kernel: that is one convolution of C channels
    and no copies of the features, instead of one of 2C on two of them.
    """

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        dtype = torch.promote_types(x.dtype, torch.float32)
        of_first, of_second = self.weight.flatten(1).to(dtype).chunk(2, dim=1)
        kernel = (of_first * first.to(dtype) + of_second * second.to(dtype))[..., None, None]
        return F.conv2d(x, kernel, self.bias)
