"""Networks of the authors' code of BicycleGAN."""

from __future__ import annotations

from typing import Any

from i2i_dist.official.names import Network, Norm, TensorsByName, Tree, count, outputs

_NORM = Norm.INSTANCE


def generator(downs: int) -> Tree:
    """Return the U-Net that reads a code at every level: each level holds the one below it between its two halves."""
    level: Tree = {"down": [None, f"downs.{downs - 1}"], "up": [None, "ups.0", _NORM]}
    for number in range(downs - 2, 0, -1):
        down: list[Tree] = [None, f"downs.{number}", _NORM]
        level = {"down": down, "submodule": level, "up": [None, f"ups.{downs - 1 - number}", _NORM]}
    return {"model": {"down": ["downs.0"], "submodule": level, "up": [None, "to_image", None]}}


def encoder(blocks: int) -> Tree:
    """Return the residual encoder, whose convolutions stand behind the linear layers in its file."""
    convs: list[Tree] = ["stem"]
    for number in range(blocks):
        block = f"blocks.{number}"
        main: list[Tree] = [_NORM, None, f"{block}.conv1", _NORM, None, [f"{block}.conv2", None]]
        convs.append({"conv": main, "shortcut": [None, f"{block}.shortcut"]})
    return {"fc": ["to_mean"], "fcVar": ["to_logvar"], "conv": [*convs, None, None]}


def critic(layers: int, scales: int) -> Tree:
    """Return the PatchGANs of a critic; a single one stands without a number."""

    def scale(number: int) -> Tree:
        ours = f"scales.{number}"
        parts: list[Tree] = [f"{ours}.stages.0", None]
        for stage in range(1, layers + 1):
            parts += [f"{ours}.stages.{stage}", _NORM, None]
        return [*parts, f"{ours}.to_logits"]

    return {"model": scale(0)} if scales == 1 else {f"model_{number}": scale(number) for number in range(scales)}


def _generator_sizes(tensors: TensorsByName) -> dict[str, Any]:
    sizes: dict[str, Any] = outputs(tensors, "model.down.0.weight", "width")
    if inner := count(tensors, r"model(\.submodule)+\.down\.1\.weight"):
        sizes["downs"] = inner + 1
    return sizes


def _encoder_sizes(tensors: TensorsByName) -> dict[str, Any]:
    blocks = count(tensors, r"conv\.\d+\.shortcut\.1\.weight")
    codes = outputs(tensors, "fc.0.weight", "style_dim")
    return codes | outputs(tensors, "conv.0.weight", "encoder_width") | ({"encoder_blocks": blocks} if blocks else {})


def _critic_sizes(tensors: TensorsByName) -> dict[str, Any]:
    scales, first = count(tensors, r"model_\d+\.0\.weight"), "model_0"
    if not scales:
        scales, first = 1, "model"
    convs = count(tensors, rf"{first}\.\d+\.weight")
    weight = tensors.get(f"{first}.0.weight")
    if convs < 3 or weight is None or weight.dim() < 2:
        return {}
    return {
        "critic_width": weight.shape[0],
        "conditional_critic": weight.shape[1] == 6,  # A and B, three channels each
        "critic_layers": convs - 2,
        "critic_scales": scales,
    }


def _critic(place: str) -> Network:
    return Network(
        f"discriminator.{place}", lambda config: critic(config.critic_layers, config.critic_scales), _critic_sizes
    )


# The name of a network in its file's name -> the network.
NETWORKS: dict[str, Network] = {
    "G": Network("generator.generator_ab", lambda config: generator(config.downs), _generator_sizes, "a_to_b"),
    "E": Network("generator.encoder", lambda config: encoder(config.encoder_blocks), _encoder_sizes, needed=True),
    "D": _critic("critic_encoded"),
    "D2": _critic("critic_random"),
}

# The official code has the networks of this model alone.
FORM: dict[str, Any] = {"model": "bicyclegan"}
