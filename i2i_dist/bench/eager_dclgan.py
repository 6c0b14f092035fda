"""DCLGAN's training step the plain way: what the released code computes, in the order and with the layers it uses.

Every pass is on its own, keys are computed with a graph that nothing uses, the fixed filters are depthwise and
transposed convolutions, and PatchNCE compares every row with every other by broadcasting. Nothing here is shared with
the step that is measured against it, apart from the patch positions, so that both can be held to the same losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.draws import Draws
from i2i_dist.methods.dclgan import DCLGAN

# Where the released generator's list of layers holds the feature maps that we call by name.
TAPS = {"down1": 4, "down2": 8} | {f"block{number}": 11 + number for number in range(1, 10)}


class Downsample(nn.Module):
    """Reflect pad, then a depthwise 3x3 convolution of stride 2 with a fixed filter."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(taps, taps).repeat(channels, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Halve `x` `[N, C, H, W]`."""
        return F.conv2d(self.pad(x), self.kernel, stride=2, groups=len(self.kernel))


class Upsample(nn.Module):
    """Replicate pad, a depthwise transposed 4x4 convolution of stride 2 with a fixed filter, then crop."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(taps, taps).repeat(channels, 1, 1, 1))
        self.pad = nn.ReplicationPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Double `x` `[N, C, H, W]`."""
        whole = F.conv_transpose2d(self.pad(x), self.kernel, stride=2, padding=2, groups=len(self.kernel))
        return whole[:, :, 1:-1, 1:-1]


class ResidualBlock(nn.Module):
    """x + branch(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        other = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        self.branch = nn.Sequential(*half, nn.ReLU(inplace=True), *other)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of `x`."""
        branch: Tensor = self.branch(x)
        return x + branch


class Generator(nn.Module):
    """The generator as one list of layers; `encode` stops after the last feature map that is asked for."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()

        def unit(conv: nn.Module, channels: int) -> list[nn.Module]:
            return [conv, nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]

        w, v, u = width, 2 * width, 4 * width
        self.layers = nn.Sequential(
            *[nn.ReflectionPad2d(3), *unit(nn.Conv2d(3, w, 7), w)],
            *[*unit(nn.Conv2d(w, v, 3, padding=1), v), Downsample(v)],
            *[*unit(nn.Conv2d(v, u, 3, padding=1), u), Downsample(u)],
            *[ResidualBlock(u) for _ in range(blocks)],
            *[Upsample(u), *unit(nn.Conv2d(u, v, 3, padding=1), v)],
            *[Upsample(v), *unit(nn.Conv2d(v, w, 3, padding=1), w)],
            *[nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh()],
        )

    def forward(self, image: Tensor) -> Tensor:
        """Translate `image`."""
        translated: Tensor = self.layers(image)
        return translated

    def encode(self, image: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Return the outputs of the layers numbered `taps`, in ascending order."""
        features, x = [], image
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in taps:
                features.append(x)
            if number == max(taps):
                break
        return features


def critic(width: int) -> nn.Sequential:
    """Return the anti-aliased PatchGAN with three halvings."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, padding=1), nn.LeakyReLU(0.2, inplace=True), Downsample(width)]
    for before, after in ((1, 2), (2, 4), (4, 8)):
        layers += [nn.Conv2d(before * width, after * width, 4, padding=1), nn.InstanceNorm2d(after * width)]
        layers += [nn.LeakyReLU(0.2, inplace=True), *([Downsample(after * width)] if after < 8 else [])]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))


class Head(nn.Module):
    """One perceptron for each feature map, over sampled locations of all images; rows of length 1."""

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(c, dim), nn.ReLU(), nn.Linear(dim, dim)) for c in channels)

    def forward(self, features: Sequence[Tensor], ids: Sequence[Tensor]) -> list[Tensor]:
        """Return `[N * P, dim]` for each feature map `[N, C, H, W]`."""
        rows = [f.permute(0, 2, 3, 1).flatten(1, 2)[:, i].flatten(0, 1) for f, i in zip(features, ids, strict=True)]
        raw = [mlp(x) for mlp, x in zip(self.mlps, rows, strict=True)]
        return [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7) for x in raw]


def patch_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Return the loss of one layer; the rows `[R, C]` of all images are one group, and `[R, R, C]` is materialised."""
    key = key.detach()
    cosine = nn.CosineSimilarity(dim=-1)
    positive = cosine(query, key)[:, None]
    similar = cosine(query[:, None, :], key[None, :, :])
    own_place = torch.eye(len(query), dtype=torch.bool, device=query.device)
    logits = torch.cat([positive, similar.masked_fill(own_place, -10.0)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters by their order, which is that of the layers in both."""
    with torch.no_grad():
        for theirs, ours in zip(target.parameters(), source.parameters(), strict=True):
            if theirs.shape != ours.shape:
                raise ValueError(f"a parameter of {list(ours.shape)} does not fit one of {list(theirs.shape)}.")
            theirs.copy_(ours)


class EagerDCLGAN:
    """Networks and optimizers that start from the weights of `method`, whose configuration must be `official`."""

    def __init__(self, method: DCLGAN, device: torch.device) -> None:
        self.config = config = method.config
        self.taps = [TAPS[name] for name in config.nce_layers]
        side = method.generator
        channels = side.generator_ab.tap_channels(config.nce_layers)
        self.g_ab, self.g_ba = (Generator(config.width, config.blocks).to(device) for _ in range(2))
        self.h_a, self.h_b = (Head(channels, config.head_dim).to(device) for _ in range(2))
        self.d_a, self.d_b = (critic(config.critic_width).to(device) for _ in range(2))
        for source, target in (
            *((side.generator_ab, self.g_ab), (side.generator_ba, self.g_ba)),
            *((side.head_a, self.h_a), (side.head_b, self.h_b)),
            *((method.discriminator.critic_a, self.d_a), (method.discriminator.critic_b, self.d_b)),
        ):
            copy_parameters(source, target)
        adam = torch.optim.Adam
        self.critics = nn.ModuleList([self.d_a, self.d_b])
        self.optimizer_d = adam(self.critics.parameters(), config.lr, config.betas)
        self.optimizer_g = adam([*self.g_ab.parameters(), *self.g_ba.parameters()], config.lr, config.betas)
        self.optimizer_h = adam([*self.h_a.parameters(), *self.h_b.parameters()], config.lr_heads, config.betas_heads)

    def step(self, a: Tensor, b: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Train once on images `[N, 3, H, W]` of both domains and return the loss terms under the method's names."""
        config = self.config
        fake_b, fake_a = self.g_ab(a), self.g_ba(b)
        identity_b, identity_a = self.g_ab(b), self.g_ba(a)

        self.critics.requires_grad_(True)
        self.optimizer_d.zero_grad()
        losses = {
            "critic_b": self._critic_loss(self.d_b, b, fake_b.detach()),
            "critic_a": self._critic_loss(self.d_a, a, fake_a.detach()),
        }
        losses["critic_b"].backward()
        losses["critic_a"].backward()
        self.optimizer_d.step()

        self.critics.requires_grad_(False)
        self.optimizer_g.zero_grad()
        self.optimizer_h.zero_grad()
        terms = {
            "gan_ab": 0.5 * config.lambda_gan * F.relu(1 - self.d_b(fake_b)).mean(),
            "gan_ba": 0.5 * config.lambda_gan * F.relu(1 - self.d_a(fake_a)).mean(),
            "nce_ab": 0.5 * self._nce("ab", a, fake_b, (self.g_ab, self.h_a), (self.g_ba, self.h_b), draws),
            "nce_ba": 0.5 * self._nce("ba", b, fake_a, (self.g_ba, self.h_b), (self.g_ab, self.h_a), draws),
            "identity_a": 0.5 * config.lambda_identity * F.l1_loss(identity_a, a),
            "identity_b": 0.5 * config.lambda_identity * F.l1_loss(identity_b, b),
        }
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer_g.step()
        self.optimizer_h.step()
        return {name: term.detach() for name, term in (losses | terms).items()}

    def _critic_loss(self, judge: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        loss: Tensor = 0.5 * (F.relu(1 + judge(fake)).mean() + F.relu(1 - judge(real)).mean())
        return loss

    def _nce(
        self,
        direction: str,
        source: Tensor,
        fake: Tensor,
        embed_source: tuple[Generator, Head],
        embed_fake: tuple[Generator, Head],
        draws: Draws,
    ) -> Tensor:
        """Compare patches of `fake` with those of `source` at the same places, each encoded by its own domain's."""
        queries = embed_fake[0].encode(fake, self.taps)
        keys = embed_source[0].encode(source, self.taps)
        ids = [
            draws.patch_ids(f"{direction}.{name}", math.prod(key.shape[2:]), self.config.nce_patches).to(key.device)
            for name, key in zip(self.config.nce_layers, keys, strict=True)
        ]
        pairs = zip(embed_fake[1](queries, ids), embed_source[1](keys, ids), strict=True)
        layers = [self.config.lambda_nce * patch_nce(query, key, self.config.temperature) for query, key in pairs]
        return torch.stack(layers).mean()
