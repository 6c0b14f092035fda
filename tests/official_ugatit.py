"""The file of the official U-GAT-IT code, written down apart from the package, as `official_networks` for others."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.official_networks import Shapes, State, _apply, _conv, _norm_relu, _reflect


def generator(w: int, light: bool = False, grid: int = 64) -> Shapes:
    c = 4 * w
    shapes: Shapes = {"gap_fc.weight": (1, c), "gmp_fc.weight": (1, c), **_conv("conv1x1", c, 2 * c, 1)}
    shapes |= {"gamma.weight": (c, c), "beta.weight": (c, c)}
    for block in (1, 2, 3, 4):
        for half in (1, 2):
            shapes[f"UpBlock1_{block}.conv{half}.weight"] = (c, c, 3, 3)
            shapes[f"UpBlock1_{block}.norm{half}.rho"] = (1, c, 1, 1)
    shapes |= {"DownBlock.1.weight": (w, 3, 7, 7), "DownBlock.5.weight": (2 * w, w, 3, 3)}
    shapes |= {"DownBlock.9.weight": (c, 2 * w, 3, 3)}
    for block in (12, 13, 14, 15):
        shapes |= {f"DownBlock.{block}.conv_block.{conv}.weight": (c, c, 3, 3) for conv in (1, 5)}
    shapes |= {"FC.0.weight": (c, c if light else c * grid * grid), "FC.2.weight": (c, c)}
    for conv, outputs in ((2, 2 * w), (7, w)):
        shapes[f"UpBlock2.{conv}.weight"] = (outputs, 2 * outputs, 3, 3)
        shapes |= {f"UpBlock2.{conv + 1}.{name}": (1, outputs, 1, 1) for name in ("rho", "gamma", "beta")}
    return shapes | {"UpBlock2.11.weight": (3, w, 7, 7)}


def _spectral(key: str, outputs: int, inputs: int, size: int, bias: bool) -> Shapes:
    kernel = (outputs, inputs, size, size) if size else (outputs, inputs)
    return {
        **({f"{key}.bias": (outputs,)} if bias else {}),
        f"{key}.weight_orig": kernel,
        f"{key}.weight_u": (outputs,),
        f"{key}.weight_v": (inputs * max(size, 1) ** 2,),
    }


def critic(w: int, convs: int) -> Shapes:
    """The critic with so many convolutions before its attention: 6 in the global one, 4 in the local one."""
    c = w * 2 ** (convs - 1)
    shapes = _spectral("gap_fc", 1, c, 0, False) | _spectral("gmp_fc", 1, c, 0, False)
    shapes |= _conv("conv1x1", c, 2 * c, 1) | _spectral("conv", 1, c, 4, False)
    inputs = 3
    for number in range(convs):
        shapes |= _spectral(f"model.{3 * number + 1}", w * 2**number, inputs, 4, True)
        inputs = w * 2**number
    return shapes


# The name of a network -> its table.
TABLE: dict[str, Callable[[int], Shapes]] = {
    **dict.fromkeys(("genA2B", "genB2A"), generator),
    **dict.fromkeys(("disGA", "disGB"), functools.partial(critic, convs=6)),
    **dict.fromkeys(("disLA", "disLB"), functools.partial(critic, convs=4)),
}


def iterated(state: State, count: int = 1) -> State:
    """Return the state with the power iterations of its layers moved on, as a forward in training does."""
    moved = dict(state)
    for key in [key.removesuffix("_orig") for key in state if key.endswith(".weight_orig")]:
        matrix, u = state[f"{key}_orig"].flatten(1), state[f"{key}_u"]
        for _ in range(count):
            v = F.normalize(matrix.T @ u, dim=0, eps=1e-12)
            u = F.normalize(matrix @ v, dim=0, eps=1e-12)
        moved |= {f"{key}_u": u, f"{key}_v": v}
    return moved


def _normalised(state: State, key: str) -> Tensor:
    weight = state[f"{key}.weight_orig"]
    return weight / (state[f"{key}.weight_u"] @ weight.flatten(1) @ state[f"{key}.weight_v"])


def _mixed(x: Tensor, rho: Tensor) -> Tensor:
    """Instance and layer norm, with the variances of n - 1."""
    n, c = x.shape[:2]
    by_channel, by_image = x.reshape(n, c, -1), x.reshape(n, 1, -1)
    by_channel = (by_channel - by_channel.mean(2, True)) / (by_channel.var(2, keepdim=True) + 1e-5).sqrt()
    by_image = (by_image - by_image.mean(2, True)) / (by_image.var(2, keepdim=True) + 1e-5).sqrt()
    return rho * by_channel.reshape(x.shape) + (1 - rho) * by_image.reshape(x.shape)


def run_generator(state: State, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the translation, the class logits [N, 2], and the heat map [N, 1, h, w]."""
    x = _norm_relu(_apply(state, "DownBlock.1", _reflect(image, 3)))
    x = _norm_relu(_apply(state, "DownBlock.5", _reflect(x, 1), stride=2))
    x = _norm_relu(_apply(state, "DownBlock.9", _reflect(x, 1), stride=2))
    for block in (12, 13, 14, 15):
        branch = _norm_relu(_apply(state, f"DownBlock.{block}.conv_block.1", _reflect(x, 1)))
        x = x + F.instance_norm(_apply(state, f"DownBlock.{block}.conv_block.5", _reflect(branch, 1)), eps=1e-5)
    logits = [x.mean((2, 3)) @ state["gap_fc.weight"].T, x.amax((2, 3)) @ state["gmp_fc.weight"].T]
    weighted = [x * state[f"{name}.weight"][0][:, None, None] for name in ("gap_fc", "gmp_fc")]
    x = F.relu(_apply(state, "conv1x1", torch.cat(weighted, 1)))
    heat_map = x.sum(1, keepdim=True)
    light = state["FC.0.weight"].shape[1] == x.shape[1]
    hidden = F.relu((x.mean((2, 3)) if light else x.flatten(1)) @ state["FC.0.weight"].T)
    hidden = F.relu(hidden @ state["FC.2.weight"].T)
    gamma, beta = ((hidden @ state[f"{name}.weight"].T)[:, :, None, None] for name in ("gamma", "beta"))
    for block in (1, 2, 3, 4):
        key = f"UpBlock1_{block}"
        branch = _mixed(_apply(state, f"{key}.conv1", _reflect(x, 1)), state[f"{key}.norm1.rho"]) * gamma + beta
        branch = _apply(state, f"{key}.conv2", _reflect(F.relu(branch), 1))
        x = _mixed(branch, state[f"{key}.norm2.rho"]) * gamma + beta + x
    for conv in (2, 7):
        norm = f"UpBlock2.{conv + 1}"
        x = _apply(state, f"UpBlock2.{conv}", _reflect(x.repeat_interleave(2, 2).repeat_interleave(2, 3), 1))
        x = F.relu(_mixed(x, state[f"{norm}.rho"]) * state[f"{norm}.gamma"] + state[f"{norm}.beta"])
    return _apply(state, "UpBlock2.11", _reflect(x, 3)).tanh(), torch.cat(logits, 1), heat_map


def run_critic(state: State, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patches' logits and the class logits [N, 2], with the power iterations as the state has them."""
    x, convs = image, sum(key.startswith("model.") and key.endswith(".weight_orig") for key in state)
    for number in range(convs):
        key = f"model.{3 * number + 1}"
        stride = 1 if number == convs - 1 else 2
        x = F.conv2d(_reflect(x, 1), _normalised(state, key), state[f"{key}.bias"], stride=stride)
        x = F.leaky_relu(x, 0.2)
    logits = [x.mean((2, 3)) @ _normalised(state, "gap_fc").T, x.amax((2, 3)) @ _normalised(state, "gmp_fc").T]
    # What scales the channels is not normalised there.
    weighted = [x * state[f"{name}.weight_orig"][0][:, None, None] for name in ("gap_fc", "gmp_fc")]
    x = F.leaky_relu(_apply(state, "conv1x1", torch.cat(weighted, 1)), 0.2)
    return F.conv2d(_reflect(x, 1), _normalised(state, "conv")), torch.cat(logits, 1)
