"""Two critics in one module: the discriminator's side of the methods that translate both ways."""

from __future__ import annotations

from typing import NamedTuple

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
