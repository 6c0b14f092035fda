"""Networks of the authors' code of StarGAN, and of MatchGAN, which is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from i2i_dist.config import ConfigError
from i2i_dist.data.labels import LabelSpace
from i2i_dist.official.names import Network, TensorsByName, TrackedNorm, Tree, count, outputs

# The two data sets of the official code. Of the colours of hair it sets one and clears the others.
CELEBA = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young")
RAFD = ("angry", "contemptuous", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
_HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")


def _parts(blocks: int) -> tuple[list[Tree], list[Tree], list[Tree]]:
    """Return what stands before the residual blocks, these, and what follows them."""
    before: list[Tree] = []
    after: list[Tree] = []
    for stage in ("stem", "down1", "down2"):
        before += [stage, TrackedNorm(f"{stage}_norm"), None]
    for stage in ("up1", "up2"):
        after += [stage, TrackedNorm(f"{stage}_norm"), None]
    residuals: list[Tree] = []
    for block in (f"blocks.{number}" for number in range(blocks)):
        first, second = TrackedNorm(f"{block}.norm1"), TrackedNorm(f"{block}.norm2")
        residuals.append({"main": [f"{block}.conv1", first, None, f"{block}.conv2", second]})
    return before, residuals, [*after, "to_image", None]


def generator(blocks: int) -> Tree:
    """Return StarGAN's generator."""
    before, residuals, after = _parts(blocks)
    return {"main": [*before, *residuals, *after]}


def halved_generator(blocks: int) -> Tree:
    """Return MatchGAN's: the same, cut in the middle of its residual blocks."""
    before, residuals, after = _parts(blocks)
    return {"encoder": [*before, *residuals[: blocks // 2]], "decoder": [*residuals[blocks // 2 :], *after]}


def critic(layers: int, matching: bool) -> Tree:
    """Return the critic, whose heads stand behind the layers that they share."""
    stages: list[Tree] = []
    for number in range(layers):
        stages += [f"stages.{number}", None]
    heads: dict[str, Tree] = {"conv1": "to_patches", "conv2": "to_classes"}
    return {"main": stages, **heads, **({"conv3": "to_match"} if matching else {})}


def _generator_sizes(tensors: TensorsByName, first: str) -> dict[str, Any]:
    blocks = count(tensors, r"(main|encoder|decoder)\.\d+\.main\.0\.weight")
    return outputs(tensors, first, "width") | ({"blocks": blocks} if blocks else {})


def _critic_sizes(tensors: TensorsByName) -> dict[str, Any]:
    layers, head = count(tensors, r"main\.\d+\.weight"), tensors.get("conv2.weight")
    sizes: dict[str, Any] = outputs(tensors, "main.0.weight", "critic_width")
    if not layers or head is None or head.dim() != 4:
        return sizes
    return sizes | {"critic_layers": layers, "image_size": head.shape[2] * 2**layers}


def _generator_attributes(tensors: TensorsByName, first: str) -> int:
    weight = tensors.get(first)
    return 0 if weight is None or weight.dim() != 4 else max(0, weight.shape[1] - 3)  # beside three colours


def _networks(first: str, *, matching: bool) -> dict[str, Network]:
    tree = halved_generator if matching else generator
    return {
        "G": Network(
            "generator.generator",
            lambda config: tree(config.blocks),
            lambda tensors: _generator_sizes(tensors, first),
            "a_to_b",
            attributes=lambda tensors: _generator_attributes(tensors, first),
        ),
        "D": Network("discriminator.critic", lambda config: critic(config.critic_layers, matching), _critic_sizes),
    }


# Method -> the name of a network in its file's name -> the network.
NETWORKS: dict[str, dict[str, Network]] = {
    "stargan": _networks("main.0.weight", matching=False),
    "matchgan": _networks("encoder.0.weight", matching=True),
}

# Half of the blocks, rounded down, is in either half of the official generator.
MULTIPLES: dict[str, int] = {"blocks": 2}


def label_keys(found: int, names: Sequence[str], exactly_one: bool) -> dict[str, Any]:
    """Return the hyperparameters that say what labels are.

    Args:
        found: How many attributes the networks have; 0 if that is not known.
        names: Their names, in order; none for those of the official code's data sets.
        exactly_one: Whether exactly one of `names` holds.

    Raises:
        ConfigError: They are not so many, cannot be names, or have to be told.
    """
    option = "--exactly-one" if exactly_one else "--attributes"
    if not names:
        if found not in (0, len(CELEBA), len(RAFD)):
            raise ConfigError(
                f"the files do not name their {found} attributes; write --attributes A,B,..., or --exactly-one A,B,... "
                "for those of which each picture has one"
            )
        names, exactly_one = (RAFD, True) if found == len(RAFD) else (CELEBA, False)
    elif found and len(names) != found:
        raise ConfigError(f"{option}: {len(names)} are given, and the files have {found}")
    hair = [name for name in _HAIR if name in names]
    exclusive = [hair] if len(hair) > 1 and not exactly_one else []
    choices = [list(names)] if exactly_one else []
    try:
        LabelSpace(names, exclusive, choices)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
    return {"attributes": list(names), "at_most_one": exclusive, "exactly_one": choices}


# What the official code computes and no shape tells.
FORM: dict[str, Any] = {"match_head": "joined"}
