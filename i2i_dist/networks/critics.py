"""Two critics in one module: the discriminator's side of the methods that translate both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class DomainPair(NamedTuple):
    """A tensor for each domain: images [N, 3, H, W] going into the critics, logits [N, 1, h, w] coming out."""

    a: Tensor
    b: Tensor


class CriticPair(nn.Module):
    """`critic_a` judges images of domain A, `critic_b` those of domain B."""

    def __init__(self, critic_a: nn.Module, critic_b: nn.Module) -> None:
        super().__init__()
        self.critic_a = critic_a
        self.critic_b = critic_b

    def forward(self, images: DomainPair) -> DomainPair:
        """Judge both domains' images."""
        return DomainPair(self.critic_a(images.a), self.critic_b(images.b))


def judge_real_and_fake(
    judge: Callable[[DomainPair], DomainPair], real: DomainPair, fake: DomainPair
) -> tuple[DomainPair, DomainPair]:
    """Return the logits of real and of fake images, each critic having seen both in one pass.

    For critics whose norms are per image, which makes this equal to two passes.
    """
    logits = judge(DomainPair(torch.cat([real.a, fake.a]), torch.cat([real.b, fake.b])))
    of_a, of_b = logits.a.split([len(real.a), len(fake.a)]), logits.b.split([len(real.b), len(fake.b)])
    return DomainPair(of_a[0], of_b[0]), DomainPair(of_a[1], of_b[1])
