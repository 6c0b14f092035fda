"""The training step of U-GAT-IT light the plain way: what the released code computes, in the order and with its layers.

Every pass is on its own, the fakes are made once for the critics and again for the generators, the critics' loss is
followed back into the generators, that of the generators into the critics, and AdaLIN is the text's formula, tensor by
tensor. Layers have the names that they have there, so that they start from what the converter makes of ours. Nothing
else here is shared with the step that is measured against it, so that both can be held to the same losses.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from i2i_dist.convert import official_tensors
from i2i_dist.draws import Draws
from i2i_dist.methods.ugatit import UGATIT

EPS = 1e-5


class Seen(NamedTuple):
    """What a network makes of images: an image or logits, the class logits [N, 2] of its attention, its heat map."""

    output: Tensor
    classes: Tensor
    heat_map: Tensor


def _normalised(x: Tensor, rho: Tensor) -> Tensor:
    """Mix instance and layer norm of `x` `[N, C, H, W]`; `rho` `[1, C, 1, 1]` is the share of instance norm."""
    of_channel, of_image = (2, 3), (1, 2, 3)
    mean, variance = x.mean(of_channel, keepdim=True), torch.var(x, of_channel, keepdim=True)
    by_channel = (x - mean) / torch.sqrt(variance + EPS)
    mean, variance = x.mean(of_image, keepdim=True), torch.var(x, of_image, keepdim=True)
    by_image = (x - mean) / torch.sqrt(variance + EPS)
    return rho * by_channel + (1 - rho) * by_image


class AdaLIN(nn.Module):
    """The norm whose gamma and beta are computed from the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, channels, 1, 1), 0.9))

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Normalise `x` `[N, C, H, W]`; `gamma` and `beta` are `[N, C]`."""
        return _normalised(x, self.rho) * gamma[:, :, None, None] + beta[:, :, None, None]


class ILN(nn.Module):
    """The norm with a gamma and beta of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[N, C, H, W]`."""
        return _normalised(x, self.rho) * self.gamma + self.beta


def _padded(conv: nn.Conv2d, pad: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(pad), conv]


class ResidualBlock(nn.Module):
    """x + branch(x), with instance norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, bias=False) for _ in range(2))
        half = [*_padded(first, 1), nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]
        self.conv_block = nn.Sequential(*half, *_padded(second, 1), nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of `x`."""
        branch: Tensor = self.conv_block(x)
        return x + branch


class AdaptiveBlock(nn.Module):
    """x + branch(x), with AdaLIN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, bias=False) for _ in range(2))
        self.norm1, self.norm2 = AdaLIN(channels), AdaLIN(channels)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Keep the shape of `x`."""
        branch: Tensor = F.relu(self.norm1(self.conv1(self.pad(x)), gamma, beta), inplace=True)
        branch = self.norm2(self.conv2(self.pad(branch)), gamma, beta)
        return branch + x


class _Attending(nn.Module):
    """Two classifiers, of averages and of maxima; the weights of each scale the channels, and a 1x1 joins the two."""

    def __init__(self, channels: int, spectral: bool) -> None:
        super().__init__()
        linears = (nn.Linear(channels, 1, bias=False) for _ in range(2))
        self.gap_fc, self.gmp_fc = (spectral_norm(linear) if spectral else linear for linear in linears)
        self.conv1x1 = nn.Conv2d(2 * channels, channels, 1)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the joined map `[N, C, H, W]`, before its activation, and the class logits `[N, 2]`."""
        logits, maps = [], []
        for classify, pool in ((self.gap_fc, F.adaptive_avg_pool2d), (self.gmp_fc, F.adaptive_max_pool2d)):
            logits.append(classify(pool(x, 1).flatten(1)))
            weight = next(iter(classify.parameters()))  # under spectral norm the one that is not normalised, as there
            maps.append(x * weight[:, :, None, None])
        return self.conv1x1(torch.cat(maps, 1)), torch.cat(logits, 1)


class Generator(_Attending):
    """The light generator."""

    def __init__(self, width: int, blocks: int) -> None:
        channels = 4 * width
        super().__init__(channels, spectral=False)
        layers: list[nn.Module] = []
        for pad, conv in (
            (3, nn.Conv2d(3, width, 7, bias=False)),
            (1, nn.Conv2d(width, 2 * width, 3, stride=2, bias=False)),
            (1, nn.Conv2d(2 * width, channels, 3, stride=2, bias=False)),
        ):
            layers += [*_padded(conv, pad), nn.InstanceNorm2d(conv.out_channels), nn.ReLU(inplace=True)]
        self.DownBlock = nn.Sequential(*layers, *[ResidualBlock(channels) for _ in range(blocks)])
        self.FC = nn.Sequential(
            *[nn.Linear(channels, channels, bias=False), nn.ReLU(inplace=True)],
            *[nn.Linear(channels, channels, bias=False), nn.ReLU(inplace=True)],
        )
        self.gamma, self.beta = (nn.Linear(channels, channels, bias=False) for _ in range(2))
        self.adaptive = [AdaptiveBlock(channels) for _ in range(blocks)]
        for number, block in enumerate(self.adaptive, 1):
            self.add_module(f"UpBlock1_{number}", block)
        layers = []
        for before in (channels, 2 * width):
            conv = nn.Conv2d(before, before // 2, 3, bias=False)
            layers += [nn.Upsample(scale_factor=2), *_padded(conv, 1), ILN(before // 2), nn.ReLU(inplace=True)]
        self.UpBlock2 = nn.Sequential(*layers, *_padded(nn.Conv2d(width, 3, 7, bias=False), 3), nn.Tanh())

    def forward(self, image: Tensor) -> Seen:
        """Translate `image`."""
        joined, classes = self.attend(self.DownBlock(image))
        x = F.relu(joined, inplace=True)
        heat_map = x.sum(1, keepdim=True)
        hidden = self.FC(F.adaptive_avg_pool2d(x, 1).flatten(1))
        gamma, beta = self.gamma(hidden), self.beta(hidden)
        for block in self.adaptive:
            x = block(x, gamma, beta)
        return Seen(self.UpBlock2(x), classes, heat_map)


class Critic(_Attending):
    """A critic with `halvings` strided layers: 5 in the global one, 3 in the local one."""

    def __init__(self, width: int, halvings: int) -> None:
        channels = [3, *(width * 2**number for number in range(halvings + 1))]
        super().__init__(channels[-1], spectral=True)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(channels)):
            conv = nn.Conv2d(before, after, 4, stride=2 if number < halvings else 1)
            layers += [*_padded(spectral_norm(conv), 1), nn.LeakyReLU(0.2, inplace=True)]
        self.model = nn.Sequential(*layers)
        self.pad = nn.ReflectionPad2d(1)
        self.conv = spectral_norm(nn.Conv2d(channels[-1], 1, 4, bias=False))

    def forward(self, image: Tensor) -> Seen:
        """Judge `image`."""
        joined, classes = self.attend(self.model(image))
        x = F.leaky_relu(joined, 0.2, inplace=True)
        heat_map = x.sum(1, keepdim=True)
        return Seen(self.conv(self.pad(x)), classes, heat_map)


def _far(seen: Seen, target: float) -> Tensor:
    """Return how far patch and class logits are from the label, each as a mean square."""
    patches, classes = (F.mse_loss(logits, torch.full_like(logits, target)) for logits in seen[:2])
    return patches + classes


def _told(seen: Seen, target: float) -> Tensor:
    """Return the cross-entropy of a generator's own class logits."""
    return F.binary_cross_entropy_with_logits(seen.classes, torch.full_like(seen.classes, target))


class EagerUGATIT:
    """Networks and optimizers that start from the weights of `method`, which must be light, of preset `official`."""

    def __init__(self, method: UGATIT, device: torch.device) -> None:
        self.config = config = method.config
        self.generators = nn.ModuleDict({key: Generator(config.width, config.blocks) for key in ("genA2B", "genB2A")})
        halvings = {"disGA": 5, "disGB": 5, "disLA": 3, "disLB": 3}
        self.critics = nn.ModuleDict({key: Critic(config.critic_width, number) for key, number in halvings.items()})
        for key, network in (*self.generators.items(), *self.critics.items()):
            network.load_state_dict(official_tensors("ugatit", method, config, key))
        self.generators.to(device)
        self.critics.to(device)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(networks.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)
            for networks in (self.generators, self.critics)
        )

    def step(self, a: Tensor, b: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Train once on images `[N, 3, H, W]` of both domains, with nothing to draw; return the terms of the losses."""
        critics = self._train_critics(a, b)
        generators = self._train_generators(a, b)
        return {name: term.detach() for name, term in (critics | generators).items()}

    def _train_critics(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        self.optimizer_d.zero_grad()
        fake_b, fake_a = self.generators["genA2B"](a).output, self.generators["genB2A"](b).output
        real = {key: self.critics[key](a if key.endswith("A") else b) for key in self.critics}
        fake = {key: self.critics[key](fake_a if key.endswith("A") else fake_b) for key in self.critics}
        weight = self.config.lambda_gan
        terms = {key: weight * (_far(real[key], 1.0) + _far(fake[key], 0.0)) for key in self.critics}
        losses = {"critic_a": terms["disGA"] + terms["disLA"], "critic_b": terms["disGB"] + terms["disLB"]}
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer_d.step()
        return losses

    def _train_generators(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        config, a2b, b2a = self.config, self.generators["genA2B"], self.generators["genB2A"]
        self.optimizer_g.zero_grad()
        fake_b, fake_a = a2b(a), b2a(b)
        cycled_a, cycled_b = b2a(fake_b.output), a2b(fake_a.output)
        same_a, same_b = b2a(a), a2b(b)
        judged = {key: self.critics[key]((fake_a if key.endswith("A") else fake_b).output) for key in self.critics}
        losses = {
            "gan_ab": config.lambda_gan * (_far(judged["disGB"], 1.0) + _far(judged["disLB"], 1.0)),
            "gan_ba": config.lambda_gan * (_far(judged["disGA"], 1.0) + _far(judged["disLA"], 1.0)),
            "cycle_a": config.lambda_cycle * F.l1_loss(cycled_a.output, a),
            "cycle_b": config.lambda_cycle * F.l1_loss(cycled_b.output, b),
            "identity_a": config.lambda_identity * F.l1_loss(same_a.output, a),
            "identity_b": config.lambda_identity * F.l1_loss(same_b.output, b),
            "cam_ab": config.lambda_cam * (_told(fake_b, 1.0) + _told(same_b, 0.0)),
            "cam_ba": config.lambda_cam * (_told(fake_a, 1.0) + _told(same_a, 0.0)),
        }
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer_g.step()
        with torch.no_grad():
            for network in self.generators.modules():
                if isinstance(network, AdaLIN | ILN):
                    network.rho.clamp_(0.0, 1.0)
        return losses
