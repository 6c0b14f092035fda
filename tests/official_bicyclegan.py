"""The files of the official BicycleGAN code, written down apart from the package, as `official_networks` for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.official_networks import Shapes, State, _apply, _conv, _doubled, _linear, _transposed


def generator(w: int, codes: int = 8, inputs: int = 3, levels: int = 8) -> Shapes:
    channels = [w * min(2**number, 8) for number in range(levels)]  # of each level's halving convolution

    def level(number: int, key: str) -> Shapes:
        outside, inside = channels[number - 1], channels[number]
        down = _conv(f"{key}.down.1", inside, outside + codes, 4)
        if number == levels - 1:
            return {**down, **_transposed(f"{key}.up.1", inside, outside, 4)}
        return {
            **down,
            **level(number + 1, f"{key}.submodule"),
            **_transposed(f"{key}.up.1", 2 * inside, outside, 4),
        }

    return {
        **_conv("model.down.0", w, inputs + codes, 4),
        **level(1, "model.submodule"),
        **_transposed("model.up.1", 2 * w, 3, 4),
    }


def encoder(w: int, codes: int = 8, blocks: int = 4) -> Shapes:
    channels = [w * min(4, number) for number in range(1, blocks + 2)]
    shapes = _linear("fc.0", codes, channels[-1]) | _linear("fcVar.0", codes, channels[-1]) | _conv("conv.0", w, 3, 4)
    for number in range(blocks):
        before, after, key = channels[number], channels[number + 1], f"conv.{number + 1}"
        shapes |= _conv(f"{key}.conv.2", before, before, 3) | _conv(f"{key}.conv.5.0", after, before, 3)
        shapes |= _conv(f"{key}.shortcut.1", after, before, 1)
    return shapes


def critic(w: int) -> Shapes:
    shapes: Shapes = {}
    for scale, width in (("model_0", w), ("model_1", w // 2)):
        shapes |= _conv(f"{scale}.0", width, 3, 4) | _conv(f"{scale}.2", 2 * width, width, 4)
        shapes |= _conv(f"{scale}.5", 4 * width, 2 * width, 4) | _conv(f"{scale}.8", 8 * width, 4 * width, 4)
        shapes |= _conv(f"{scale}.11", 1, 8 * width, 4)
    return shapes


# The name of a network -> its table.
TABLE: dict[str, Callable[[int], Shapes]] = {"G": generator, "E": encoder, "D": critic, "D2": critic}


def run_generator(state: State, image: Tensor, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
    """Translate with codes [N, Z]; `masks` holds what dropout keeps at levels 6, 5 and 4, or is empty."""
    levels = 1 + sum(key.endswith(".down.1.weight") for key in state)

    def with_code(x: Tensor) -> Tensor:
        return torch.cat([x, code[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)

    def level(number: int, key: str, x: Tensor) -> Tensor:
        y = _apply(state, f"{key}.down.1", F.leaky_relu(with_code(x), 0.2), stride=2, padding=1)
        if number < levels - 1:
            y = level(number + 1, f"{key}.submodule", F.instance_norm(y, eps=1e-5))
        y = F.instance_norm(_doubled(state, f"{key}.up.1", F.relu(y)), eps=1e-5)
        if masks and number in (6, 5, 4):
            y = y * masks[6 - number] * 2.0
        return torch.cat([y, x], 1)

    x = _apply(state, "model.down.0", with_code(image), stride=2, padding=1)
    return _doubled(state, "model.up.1", F.relu(level(1, "model.submodule", x))).tanh()


def run_encoder(state: State, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and logarithm of the variance of each code, [N, Z]."""

    def activated(x: Tensor) -> Tensor:
        return F.leaky_relu(F.instance_norm(x, eps=1e-5), 0.2)

    x = _apply(state, "conv.0", image, stride=2, padding=1)
    for number in range(1, 1 + sum(key.endswith(".shortcut.1.weight") for key in state)):
        key = f"conv.{number}"
        main = _apply(state, f"{key}.conv.2", activated(x), padding=1)
        main = F.avg_pool2d(_apply(state, f"{key}.conv.5.0", activated(main), padding=1), 2)
        x = main + _apply(state, f"{key}.shortcut.1", F.avg_pool2d(x, 2))
    x = F.avg_pool2d(F.leaky_relu(x, 0.2), 8).flatten(1)
    mean, log_variance = (x @ state[f"{key}.weight"].T + state[f"{key}.bias"] for key in ("fc.0", "fcVar.0"))
    return mean, log_variance


def run_critic(state: State, image: Tensor) -> list[Tensor]:
    """Return the logits of both scales."""
    logits = []
    for scale in ("model_0", "model_1"):
        x = F.leaky_relu(_apply(state, f"{scale}.0", image, stride=2, padding=1), 0.2)
        for conv, stride in ((2, 2), (5, 2), (8, 1)):
            x = _apply(state, f"{scale}.{conv}", x, stride=stride, padding=1)
            x = F.leaky_relu(F.instance_norm(x, eps=1e-5), 0.2)
        logits.append(_apply(state, f"{scale}.11", x, padding=1))
        image = F.avg_pool2d(image, 3, stride=2, padding=1, count_include_pad=False)
    return logits
