"""The files of the official StarGAN and MatchGAN codes, written down apart from the package, as `official_networks`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.official_networks import Shapes, State, _apply, _batch_norm, _conv, _doubled, _transposed

_CUT = 12  # of StarGAN's layers, 0 to 22, those from this one on are MatchGAN's decoder


def generator(w: int, labels: int = 5, blocks: int = 6) -> Shapes:
    shapes: Shapes = {}
    for conv, outputs, inputs, size in ((0, w, 3 + labels, 7), (3, 2 * w, w, 4), (6, 4 * w, 2 * w, 4)):
        shapes |= _conv(f"main.{conv}", outputs, inputs, size, bias=False) | _batch_norm(f"main.{conv + 1}", outputs)
    for block in range(9, 9 + blocks):
        for conv in (0, 3):
            shapes |= _conv(f"main.{block}.main.{conv}", 4 * w, 4 * w, 3, bias=False)
            shapes |= _batch_norm(f"main.{block}.main.{conv + 1}", 4 * w)
    for conv, inputs in ((9 + blocks, 4 * w), (12 + blocks, 2 * w)):
        shapes |= _transposed(f"main.{conv}", inputs, inputs // 2, 4, bias=False)
        shapes |= _batch_norm(f"main.{conv + 1}", inputs // 2)
    return shapes | _conv(f"main.{15 + blocks}", 3, w, 7, bias=False)


def cut_generator(w: int, labels: int = 5, blocks: int = 6) -> Shapes:
    """MatchGAN's: the layers are the same, and half of the blocks are in the decoder, which counts anew."""

    def renamed(key: str) -> str:
        number, _, rest = key.removeprefix("main.").partition(".")
        first = 9 + blocks // 2
        return f"encoder.{key[5:]}" if int(number) < first else f"decoder.{int(number) - first}.{rest}"

    return {renamed(key): shape for key, shape in generator(w, labels, blocks).items()}


def critic(w: int, labels: int = 5, size: int = 128, convs: int = 6, matching: bool = False) -> Shapes:
    shapes: Shapes = {}
    for number in range(convs):
        shapes |= _conv(f"main.{2 * number}", w * 2**number, w * 2 ** (number - 1) if number else 3, 4)
    deep, kernel = w * 2 ** (convs - 1), size // 2**convs
    shapes |= _conv("conv1", 1, deep, 3, bias=False) | _conv("conv2", labels, deep, kernel, bias=False)
    return shapes | (_conv("conv3", 2, 2 * deep, kernel, bias=False) if matching else {})


# Method -> the name of a network -> its table.
TABLES: dict[str, dict[str, Callable[[int], Shapes]]] = {
    "stargan": {"G": generator, "D": critic},
    "matchgan": {"G": cut_generator, "D": functools.partial(critic, matching=True)},
}


def idle(state: State) -> State:
    """Return the state with the statistics that a norm begins with."""
    begins = {"running_mean": torch.zeros_like, "running_var": torch.ones_like, "num_batches_tracked": torch.zeros_like}
    fresh = {key: begins.get(key.rpartition(".")[2]) for key in state}
    return {key: tensor if (make := fresh[key]) is None else make(tensor) for key, tensor in state.items()}


def run_generator(state: State, image: Tensor, labels: Tensor) -> Tensor:
    """Translate with labels [N, L]; norms have the statistics of the image, as in a network that is in training."""
    if "main.0.weight" not in state:  # put the cut generator together again
        parts = {key: key.split(".", 2) for key in state}
        state = {
            f"main.{int(number) + (_CUT if half == 'decoder' else 0)}.{rest}": state[key]
            for key, (half, number, rest) in parts.items()
        }

    def normed(key: str, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=state[f"{key}.weight"], bias=state[f"{key}.bias"], eps=1e-5)

    x = torch.cat([image, labels[:, :, None, None].expand(-1, -1, *image.shape[2:])], 1)
    x = F.relu(normed("main.1", _apply(state, "main.0", x, padding=3)))
    for conv in (3, 6):
        x = F.relu(normed(f"main.{conv + 1}", _apply(state, f"main.{conv}", x, stride=2, padding=1)))
    for block in range(9, 15):
        key = f"main.{block}.main"
        y = F.relu(normed(f"{key}.1", _apply(state, f"{key}.0", x, padding=1)))
        x = x + normed(f"{key}.4", _apply(state, f"{key}.3", y, padding=1))
    for conv in (15, 18):
        x = F.relu(normed(f"main.{conv + 1}", _doubled(state, f"main.{conv}", x)))
    return _apply(state, "main.21", x, padding=3).tanh()


def run_critic(state: State, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patches and the logits of the attributes [N, L]."""
    x = _features(state, image)
    return _apply(state, "conv1", x, padding=1), _apply(state, "conv2", x).flatten(1)


def run_match(state: State, first: Tensor, second: Tensor) -> Tensor:
    """Return the logits [N, 2] of pairs of images."""
    return _apply(state, "conv3", torch.cat([_features(state, first), _features(state, second)], 1)).flatten(1)


def _features(state: State, image: Tensor) -> Tensor:
    x = image
    for conv in range(0, 12, 2):
        x = F.leaky_relu(_apply(state, f"main.{conv}", x, stride=2, padding=1), 0.01)
    return x
