"""The files of the official code, written down apart from the package: what each holds, and what a network makes of it.

`TABLES` gives, for each kind of network, the key and shape of every tensor of its file in order. The functions below it
compute a network's output from such tensors with `torch.nn.functional` alone, layer by layer as that code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
UPSAMPLE = torch.tensor([[1.0, 3.0, 3.0, 1.0], [3.0, 9.0, 9.0, 3.0], [3.0, 9.0, 9.0, 3.0], [1.0, 3.0, 3.0, 1.0]]) / 16


# --------------------------------------------------------------------------------------------------- keys and shapes


def _conv(key: str, outputs: int, inputs: int, size: int, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (outputs, inputs, size, size)} | ({f"{key}.bias": (outputs,)} if bias else {})


def _transposed(key: str, inputs: int, outputs: int, size: int, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (inputs, outputs, size, size)} | ({f"{key}.bias": (outputs,)} if bias else {})


def _linear(key: str, outputs: int, inputs: int) -> Shapes:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def _batch_norm(key: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{key}.{name}": (channels,) for name in vectors} | {f"{key}.num_batches_tracked": ()}


def _blocks(first: int, count: int, channels: int) -> Shapes:
    shapes: Shapes = {}
    for number in range(first, first + count):
        shapes |= _conv(f"model.{number}.conv_block.1", channels, channels, 3)
        shapes |= _conv(f"model.{number}.conv_block.5", channels, channels, 3)
    return shapes


def resnet_antialiased(w: int) -> Shapes:
    return {
        **_conv("model.1", w, 3, 7),
        **_conv("model.4", 2 * w, w, 3),
        "model.7.filt": (2 * w, 1, 3, 3),
        **_conv("model.8", 4 * w, 2 * w, 3),
        "model.11.filt": (4 * w, 1, 3, 3),
        **_blocks(12, 9, 4 * w),
        "model.21.filt": (4 * w, 1, 4, 4),
        **_conv("model.22", 2 * w, 4 * w, 3),
        "model.25.filt": (2 * w, 1, 4, 4),
        **_conv("model.26", w, 2 * w, 3),
        **_conv("model.30", 3, w, 7),
    }


def resnet_plain(w: int) -> Shapes:
    return {
        **_conv("model.1", w, 3, 7),
        **_conv("model.4", 2 * w, w, 3),
        **_conv("model.7", 4 * w, 2 * w, 3),
        **_blocks(10, 9, 4 * w),
        **_transposed("model.19", 4 * w, 2 * w, 3),
        **_transposed("model.22", 2 * w, w, 3),
        **_conv("model.26", 3, w, 7),
    }


def resnet_plain_6_blocks(w: int) -> Shapes:
    return {
        **_conv("model.1", w, 3, 7),
        **_conv("model.4", 2 * w, w, 3),
        **_conv("model.7", 4 * w, 2 * w, 3),
        **_blocks(10, 6, 4 * w),
        **_transposed("model.16", 4 * w, 2 * w, 3),
        **_transposed("model.19", 2 * w, w, 3),
        **_conv("model.23", 3, w, 7),
    }


def patchgan_antialiased(w: int) -> Shapes:
    return {
        **_conv("model.0", w, 3, 4),
        "model.2.filt": (w, 1, 3, 3),
        **_conv("model.3", 2 * w, w, 4),
        "model.6.filt": (2 * w, 1, 3, 3),
        **_conv("model.7", 4 * w, 2 * w, 4),
        "model.10.filt": (4 * w, 1, 3, 3),
        **_conv("model.11", 8 * w, 4 * w, 4),
        **_conv("model.14", 1, 8 * w, 4),
    }


def patchgan_plain(w: int) -> Shapes:
    return {
        **_conv("model.0", w, 3, 4),
        **_conv("model.2", 2 * w, w, 4),
        **_conv("model.5", 4 * w, 2 * w, 4),
        **_conv("model.8", 8 * w, 4 * w, 4),
        **_conv("model.11", 1, 8 * w, 4),
    }


def patchgan_batch_norm(w: int) -> Shapes:
    return {
        **_conv("model.0", w, 6, 4),
        **_conv("model.2", 2 * w, w, 4, bias=False),
        **_batch_norm("model.3", 2 * w),
        **_conv("model.5", 4 * w, 2 * w, 4, bias=False),
        **_batch_norm("model.6", 4 * w),
        **_conv("model.8", 8 * w, 4 * w, 4, bias=False),
        **_batch_norm("model.9", 8 * w),
        **_conv("model.11", 1, 8 * w, 4),
    }


def heads_of_four(w: int) -> Shapes:
    """The heads of DCLGAN on a generator of width `w`, with `4 * w` outputs (256 at full width)."""
    shapes: Shapes = {}
    for number, inputs in enumerate((2 * w, 4 * w, 4 * w, 4 * w)):
        shapes |= _linear(f"mlp_{number}.0", 4 * w, inputs) | _linear(f"mlp_{number}.2", 4 * w, 4 * w)
    return shapes


def heads_of_five(w: int) -> Shapes:
    """The heads of CUT, which also read the image itself."""
    shapes: Shapes = {}
    for number, inputs in enumerate((3, 2 * w, 4 * w, 4 * w, 4 * w)):
        shapes |= _linear(f"mlp_{number}.0", 4 * w, inputs) | _linear(f"mlp_{number}.2", 4 * w, 4 * w)
    return shapes


def mapping(_: int) -> Shapes:
    return {**_conv("model.0", 64, 4, 3), **_linear("model.4", 64, 64), **_linear("model.6", 64, 64)}


def unet_256(w: int) -> Shapes:
    channels = (w, 2 * w, 4 * w, 8 * w, 8 * w, 8 * w, 8 * w, 8 * w)  # of the level's halving convolution

    def level(number: int, key: str) -> Shapes:
        outside, inside = channels[number - 1], channels[number]
        down = _conv(f"{key}.model.1", inside, outside, 4, bias=False)
        if number == 7:
            return {
                **down,
                **_transposed(f"{key}.model.3", inside, outside, 4, bias=False),
                **_batch_norm(f"{key}.model.4", outside),
            }
        return {
            **down,
            **_batch_norm(f"{key}.model.2", inside),
            **level(number + 1, f"{key}.model.3"),
            **_transposed(f"{key}.model.5", 2 * inside, outside, 4, bias=False),
            **_batch_norm(f"{key}.model.6", outside),
        }

    return {
        **_conv("model.model.0", w, 3, 4, bias=False),
        **level(1, "model.model.1"),
        **_transposed("model.model.3", 2 * w, 3, 4),
    }


def random_state(shapes: Shapes, seed: int) -> State:
    """Fill a table with numbers that keep a network's values near 1, and the fixed filters with theirs."""
    generator = torch.Generator().manual_seed(seed)

    def values(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith(".filt"):
            return (BLUR if shape[-1] == 3 else UPSAMPLE).repeat(shape[0], 1, 1, 1)
        if key.endswith(".num_batches_tracked"):
            return torch.tensor(4000 + seed)
        drawn = torch.randn(shape, generator=generator)
        if key.endswith(".rho"):
            return drawn.abs().remainder(1.0)
        if key.endswith((".weight_u", ".weight_v")):
            return drawn / drawn.norm()
        if key.endswith(".running_var"):
            return drawn.abs() + 0.5
        if len(shape) == 1 or shape[2:] == (1, 1) == shape[:1] * 2:
            is_scale = key.endswith((".weight", ".gamma"))
            return 1.0 + 0.2 * drawn if is_scale else 0.2 * drawn
        return drawn / math.sqrt(math.prod(shape[1:]))

    return {key: values(key, shape) for key, shape in shapes.items()}


# ------------------------------------------------------------------------------------------------- what they compute


def _apply(state: State, key: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), **options)


def _doubled(state: State, key: str, x: Tensor, **options: int) -> Tensor:
    return F.conv_transpose2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), stride=2, padding=1, **options)


def _reflect(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (width,) * 4, mode="reflect")


def _norm_relu(x: Tensor) -> Tensor:
    return F.relu(F.instance_norm(x, eps=1e-5))


def _blurred(state: State, key: str, x: Tensor) -> Tensor:
    return F.conv2d(_reflect(x, 1), state[f"{key}.filt"], stride=2, groups=x.size(1))


def _upsampled(state: State, key: str, x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    doubled = F.conv_transpose2d(padded, state[f"{key}.filt"], stride=2, padding=2, groups=x.size(1))
    return doubled[:, :, 1:-1, 1:-1]


def _block(state: State, number: int, x: Tensor) -> Tensor:
    branch = _norm_relu(_apply(state, f"model.{number}.conv_block.1", _reflect(x, 1)))
    return x + F.instance_norm(_apply(state, f"model.{number}.conv_block.5", _reflect(branch, 1)), eps=1e-5)


def run_resnet_antialiased(state: State, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the translation, and the outputs of layers 0, 4, 8, 12 and 16."""
    padded = _reflect(image, 3)
    layer4 = _apply(state, "model.4", _norm_relu(_apply(state, "model.1", padded)), padding=1)
    layer8 = _apply(state, "model.8", _blurred(state, "model.7", _norm_relu(layer4)), padding=1)
    x = _blurred(state, "model.11", _norm_relu(layer8))
    outputs = {}
    for number in range(12, 21):
        outputs[number] = x = _block(state, number, x)
    x = _norm_relu(_apply(state, "model.22", _upsampled(state, "model.21", x), padding=1))
    x = _norm_relu(_apply(state, "model.26", _upsampled(state, "model.25", x), padding=1))
    return _apply(state, "model.30", _reflect(x, 3)).tanh(), [padded, layer4, layer8, outputs[12], outputs[16]]


def run_resnet_plain(state: State, image: Tensor) -> Tensor:
    x = _norm_relu(_apply(state, "model.1", _reflect(image, 3)))
    x = _norm_relu(_apply(state, "model.4", x, stride=2, padding=1))
    x = _norm_relu(_apply(state, "model.7", x, stride=2, padding=1))
    for number in range(10, 19):
        x = _block(state, number, x)
    x = _norm_relu(_doubled(state, "model.19", x, output_padding=1))
    x = _norm_relu(_doubled(state, "model.22", x, output_padding=1))
    return _apply(state, "model.26", _reflect(x, 3)).tanh()


def run_patchgan_antialiased(state: State, image: Tensor) -> Tensor:
    x = F.leaky_relu(_apply(state, "model.0", image, padding=1), 0.2)
    for blur, conv in (("model.2", "model.3"), ("model.6", "model.7"), ("model.10", "model.11")):
        x = _apply(state, conv, _blurred(state, blur, x), padding=1)
        x = F.leaky_relu(F.instance_norm(x, eps=1e-5), 0.2)
    return _apply(state, "model.14", x, padding=1)


def run_patchgan_plain(state: State, image: Tensor) -> Tensor:
    x = F.leaky_relu(_apply(state, "model.0", image, stride=2, padding=1), 0.2)
    for conv, stride in (("model.2", 2), ("model.5", 2), ("model.8", 1)):
        x = _apply(state, conv, x, stride=stride, padding=1)
        x = F.leaky_relu(F.instance_norm(x, eps=1e-5), 0.2)
    return _apply(state, "model.11", x, padding=1)


def _batch_normed(state: State, key: str, x: Tensor, training: bool) -> Tensor:
    mean, variance = state[f"{key}.running_mean"].clone(), state[f"{key}.running_var"].clone()
    return F.batch_norm(x, mean, variance, state[f"{key}.weight"], state[f"{key}.bias"], training=training, eps=1e-5)


def run_patchgan_batch_norm(state: State, pair: Tensor) -> Tensor:
    x = F.leaky_relu(_apply(state, "model.0", pair, stride=2, padding=1), 0.2)
    for conv, norm, stride in (("model.2", "model.3", 2), ("model.5", "model.6", 2), ("model.8", "model.9", 1)):
        x = _batch_normed(state, norm, _apply(state, conv, x, stride=stride, padding=1), training=True)
        x = F.leaky_relu(x, 0.2)
    return _apply(state, "model.11", x, padding=1)


def run_unet_256(state: State, image: Tensor, masks: Sequence[Tensor], training: bool) -> Tensor:
    """Return the translation; `masks` holds what dropout keeps at levels 6, 5 and 4, scaled by 2, or is empty."""

    def level(number: int, key: str, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, 0.2)  # in place there, so it is what is concatenated below, too
        y = _apply(state, f"{key}.model.1", x, stride=2, padding=1)
        if number == 7:
            y = _batch_normed(state, f"{key}.model.4", _doubled(state, f"{key}.model.3", F.relu(y)), training)
            return torch.cat([x, y], 1)
        y = _batch_normed(state, f"{key}.model.2", y, training)
        y = level(number + 1, f"{key}.model.3", y)
        y = _batch_normed(state, f"{key}.model.6", _doubled(state, f"{key}.model.5", F.relu(y)), training)
        if masks and number in (6, 5, 4):
            y = y * masks[6 - number] * 2.0
        return torch.cat([x, y], 1)

    x = level(1, "model.model.1", _apply(state, "model.model.0", image, stride=2, padding=1))
    return _doubled(state, "model.model.3", F.relu(x)).tanh()


def run_heads(state: State, features: Sequence[Tensor]) -> list[Tensor]:
    """Return for each feature map [N, P, C] its projection, normalised: [N, P, D]."""

    def mlp(number: int, x: Tensor) -> Tensor:
        first, second = f"mlp_{number}.0", f"mlp_{number}.2"
        x = F.relu(F.linear(x, state[f"{first}.weight"], state[f"{first}.bias"]))
        x = F.linear(x, state[f"{second}.weight"], state[f"{second}.bias"])
        return x / (x.pow(2).sum(-1, keepdim=True).sqrt() + 1e-7)

    return [mlp(number, x) for number, x in enumerate(features)]


def run_mapping(state: State, projected: Sequence[Tensor]) -> Tensor:
    """Return the vector [1, 64] of four normalised projections [P, D]."""
    x = F.relu(_apply(state, "model.0", torch.stack(list(projected))[None], stride=2)).mean((2, 3))
    x = F.relu(F.linear(x, state["model.4.weight"], state["model.4.bias"]))
    x = F.linear(x, state["model.6.weight"], state["model.6.bias"])
    return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)


# Method -> name of a network -> the table of its file.
TABLES: dict[str, dict[str, Callable[[int], Shapes]]] = {
    "cut": {"G": resnet_antialiased, "F": heads_of_five, "D": patchgan_antialiased},
    "cyclegan": {"G_A": resnet_plain, "G_B": resnet_plain, "D_A": patchgan_plain, "D_B": patchgan_plain},
    "dclgan": {
        **dict.fromkeys(("G_A", "G_B"), resnet_antialiased),
        **dict.fromkeys(("D_A", "D_B"), patchgan_antialiased),
        **dict.fromkeys(("F1", "F2"), heads_of_four),
    },
    "pix2pix": {"G": unet_256, "D": patchgan_batch_norm},
    "simdcl": {
        **dict.fromkeys(("G_A", "G_B"), resnet_antialiased),
        **dict.fromkeys(("D_A", "D_B"), patchgan_antialiased),
        **dict.fromkeys(("F1", "F2"), heads_of_four),
        **dict.fromkeys(("F3", "F4", "F5", "F6"), mapping),
    },
}
