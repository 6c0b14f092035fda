"""Networks of the authors' PyTorch code of U-GAT-IT, of its full and its light form."""

from __future__ import annotations

import math
from typing import Any

from i2i_dist.method import Direction
from i2i_dist.official.names import Columns, Network, Norm, Spectral, TensorsByName, Tree, count, outputs


def generator(blocks: int) -> Tree:
    """Return the generator; the two forms differ in the shape of one tensor alone."""
    norm, iln = Norm.INSTANCE, ("rho", "gamma", "beta")
    down: list[Tree] = []
    for stage in ("stem", "down1", "down2"):
        down += [None, f"{stage}.conv", norm, None]
    for i in range(blocks):
        down.append({"conv_block": [None, f"blocks.{i}.conv1", norm, None, None, f"blocks.{i}.conv2", norm]})
    up: list[Tree] = []
    for stage in ("up1", "up2"):
        up += [None, None, f"{stage}.conv", Columns(f"{stage}.norm", iln), None]
    return {
        "gap_fc": "cam.of_mean",
        "gmp_fc": "cam.of_max",
        "conv1x1": "cam.merge",
        "gamma": "style.to_gamma",
        "beta": "style.to_beta",
        **{f"UpBlock1_{number + 1}": _adaptive_block(f"adaptive_blocks.{number}") for number in range(blocks)},
        "DownBlock": down,
        "FC": ["style.hidden1", None, "style.hidden2", None],
        "UpBlock2": [*up, None, "to_image", None],
    }


def _adaptive_block(ours: str) -> Tree:
    parts: dict[str, Tree] = {}
    for number in (1, 2):
        parts[f"conv{number}"] = f"{ours}.conv{number}"
        parts[f"norm{number}"] = Columns(f"{ours}.norm{number}", ("rho",))
    return parts


def critic(layers: int) -> Tree:
    """Return a critic of so many layers as the official code counts them."""
    stages: list[Tree] = []
    for number in range(layers - 1):
        stages += [None, Spectral(f"stages.{number}"), None]
    return {
        "gap_fc": Spectral("cam.of_mean"),
        "gmp_fc": Spectral("cam.of_max"),
        "conv1x1": "cam.merge",
        "conv": Spectral("to_patches"),
        "model": stages,
    }


def _generator_sizes(tensors: TensorsByName) -> dict[str, Any]:
    blocks = count(tensors, r"DownBlock\.\d+\.conv_block\.1\.weight")
    sizes: dict[str, Any] = outputs(tensors, "DownBlock.1.weight", "width") | ({"blocks": blocks} if blocks else {})
    reads = tensors.get("FC.0.weight")
    if reads is None or reads.dim() != 2 or not len(reads):
        return sizes
    if reads.shape[1] == reads.shape[0]:
        return sizes | {"light": True}
    return sizes | {"cam_grid": max(1, math.isqrt(reads.shape[1] // reads.shape[0]))}


def _critic_sizes(tensors: TensorsByName, layers: str) -> dict[str, Any]:
    before = count(tensors, r"model\.\d+\.weight_orig")
    return outputs(tensors, "model.1.weight_orig", "critic_width") | ({layers: before + 1} if before else {})


def _generator(place: str, direction: Direction) -> Network:
    return Network(f"generator.{place}", lambda config: generator(config.blocks), _generator_sizes, direction)


def _critic(place: str, layers: str) -> Network:
    return Network(
        f"discriminator.{place}",
        lambda config: critic(getattr(config, layers)),
        lambda tensors: _critic_sizes(tensors, layers),
    )


# The name of a network in the file -> the network.
NETWORKS: dict[str, Network] = {
    "genA2B": _generator("generator_ab", "a_to_b"),
    "genB2A": _generator("generator_ba", "b_to_a"),
    "disGA": _critic("global_a", "global_layers"),
    "disGB": _critic("global_b", "global_layers"),
    "disLA": _critic("local_a", "local_layers"),
    "disLB": _critic("local_b", "local_layers"),
}

# What the official code computes: hyperparameters that no shape tells, and depths that it does not read off one.
FORM: dict[str, Any] = {
    "global_layers": 7,
    "local_layers": 5,
    **dict.fromkeys(("bias", "affine", "cam_shared", "cam_normalised", "rho_smoothing"), False),
    "variance": "unbiased",
}
