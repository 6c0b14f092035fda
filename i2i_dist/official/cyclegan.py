"""Networks of the authors' code of CycleGAN and pix2pix, of CUT, DCLGAN and SimDCL, which are built on it."""

from __future__ import annotations

import torch
from torch import Tensor

from i2i_dist.method import Direction
from i2i_dist.networks.blocks import BlurDownsample
from i2i_dist.official.names import BatchNorm, Network, Norm, TensorsByName, Tree, count, outputs


def _blur(channels: int) -> Tensor:
    return BlurDownsample(1).kernel.expand(channels, 1, 3, 3)


def _upsampling(channels: int) -> Tensor:
    """Return the filter that the official code upsamples with; `networks.blocks.upsample` is equal to it."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    return torch.outer(taps, taps).expand(channels, 1, 4, 4)


def resnet(width: int, blocks: int, antialias: bool) -> Tree:
    """Return the ResNet generator: pads, convolutions, norms and activations in their order."""
    norm = Norm.INSTANCE
    encoder: list[Tree] = [None, "stem", norm, None]
    decoder: list[Tree] = []
    for number in (1, 2):
        encoder += [f"down{number}", norm, None, *([_blur(2**number * width)] if antialias else [])]
        decoder += [*([_upsampling(2 ** (3 - number) * width)] if antialias else []), f"up{number}.conv", norm, None]
    residuals: list[Tree] = [
        {"conv_block": [None, f"blocks.{i}.conv1", norm, None, None, f"blocks.{i}.conv2", norm]} for i in range(blocks)
    ]
    return {"model": [*encoder, *residuals, *decoder, None, "to_image", None]}


def patchgan(width: int, antialias: bool, batch_norm: bool) -> Tree:
    """Return the PatchGAN discriminator with three halvings."""
    layers: list[Tree] = ["stages.0", None]
    for stage in (1, 2, 3):
        norm = BatchNorm(f"norms.{stage - 1}") if batch_norm else Norm.INSTANCE
        layers += [*([_blur(2 ** (stage - 1) * width)] if antialias else []), f"stages.{stage}", norm, None]
    return {"model": [*layers, "to_logits"]}


def unet(downs: int) -> Tree:
    """Return the U-Net generator: each level is a sequence with the level below it in its middle."""
    level: Tree = {"model": [None, f"downs.{downs - 1}", None, "ups.0", BatchNorm("up_norms.0")]}
    for number in range(downs - 2, 0, -1):
        up = downs - 1 - number
        down = [None, f"downs.{number}", BatchNorm(f"down_norms.{number - 1}")]
        level = {"model": [*down, level, None, f"ups.{up}", BatchNorm(f"up_norms.{up}")]}
    return {"model": {"model": ["downs.0", level, None, "to_image", None]}}


def heads(count: int) -> Tree:
    """Return the projection head: one two-layer perceptron for each feature map."""
    return {f"mlp_{i}": [f"heads.{i}.0", None, f"heads.{i}.2"] for i in range(count)}


def mapping() -> Tree:
    """Return SimDCL's mapping network: convolution, ReLU, mean, flattening, two linear layers with a ReLU between."""
    return {"model": ["conv", None, None, None, "hidden", None, "to_vector"]}


def _resnet_sizes(tensors: TensorsByName) -> dict[str, int]:
    blocks = count(tensors, r"model\.\d+\.conv_block\.1\.weight")
    return outputs(tensors, "model.1.weight", "width") | ({"blocks": blocks} if blocks else {})


def _unet_sizes(tensors: TensorsByName) -> dict[str, int]:
    inner = count(tensors, r"model\.model\.1\.model(\.3\.model)*\.1\.weight")
    return outputs(tensors, "model.model.0.weight", "width") | ({"downs": inner + 1} if inner else {})


def _critic_sizes(tensors: TensorsByName) -> dict[str, int]:
    return outputs(tensors, "model.0.weight", "critic_width")


def _head_sizes(tensors: TensorsByName) -> dict[str, int]:
    return outputs(tensors, "mlp_0.0.weight", "head_dim")


def _generator(place: str, direction: Direction, *, antialias: bool) -> Network:
    return Network(place, lambda config: resnet(config.width, config.blocks, antialias), _resnet_sizes, direction)


def _critic(place: str, *, antialias: bool, batch_norm: bool = False) -> Network:
    return Network(place, lambda config: patchgan(config.critic_width, antialias, batch_norm), _critic_sizes)


def _head(place: str) -> Network:
    return Network(place, lambda config: heads(len(config.nce_layers)), _head_sizes, taps=True)


def _mapping(place: str) -> Network:
    return Network(place, lambda _: mapping(), lambda _: {})


def _both_ways(*, antialias: bool) -> dict[str, Network]:
    # The official D_A judges what G_A makes, which are images of domain B.
    return {
        "G_A": _generator("generator.generator_ab", "a_to_b", antialias=antialias),
        "G_B": _generator("generator.generator_ba", "b_to_a", antialias=antialias),
        "D_A": _critic("discriminator.critic_b", antialias=antialias),
        "D_B": _critic("discriminator.critic_a", antialias=antialias),
    }


_DCLGAN = _both_ways(antialias=True) | {"F1": _head("generator.head_a"), "F2": _head("generator.head_b")}

# Method -> the name of a network in its file's name -> the network.
NETWORKS: dict[str, dict[str, Network]] = {
    "cut": {
        "G": _generator("generator.generator_ab", "a_to_b", antialias=True),
        "F": _head("generator.head"),
        "D": _critic("discriminator.critic_b", antialias=True),
    },
    "cyclegan": _both_ways(antialias=False),
    "dclgan": _DCLGAN,
    "pix2pix": {
        "G": Network("generator.generator_ab", lambda config: unet(config.downs), _unet_sizes, "a_to_b"),
        "D": _critic("discriminator.critic_b", antialias=False, batch_norm=True),
    },
    "simdcl": _DCLGAN
    | {
        "F3": _mapping("generator.mapping_real_a"),
        "F4": _mapping("generator.mapping_fake_b"),
        "F5": _mapping("generator.mapping_real_b"),
        "F6": _mapping("generator.mapping_fake_a"),
    },
}
