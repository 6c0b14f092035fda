"""Everything that changes over training, as a function of images seen."""

from __future__ import annotations

from typing import Literal, NamedTuple


class LinearDecay(NamedTuple):
    """The learning-rate factor of the CycleGAN family: constant, then linear decay, one stair per epoch.

    Epoch e (counted from 1) trains with 1 - max(0, e - constant) / (decay + 1), never 0; with `decay_step`
    "epoch_start" (the 2020 code of CycleGAN and pix2pix) the rate is lowered before the epoch, so decay begins one
    epoch earlier and the last epoch trains with 0.
    """

    epoch_images: int
    constant_epochs: int
    decay_epochs: int
    decay_step: Literal["epoch_end", "epoch_start"]

    @property
    def total_images(self) -> int:
        """Images seen when training is over."""
        return self.epoch_images * (self.constant_epochs + self.decay_epochs)

    @property
    def decay_starts(self) -> int:
        """Images seen when the last constant epoch is over."""
        return self.epoch_images * self.constant_epochs

    def factor(self, images_seen: int) -> float:
        """Return the factor of the learning rate, in [0, 1], for the update that starts at `images_seen`."""
        epoch = 1 + min(images_seen, max(self.total_images - 1, 0)) // self.epoch_images
        past = epoch - self.constant_epochs + (1 if self.decay_step == "epoch_start" else 0)
        return max(0.0, 1.0 - max(0, past) / (self.decay_epochs + 1))


def ema_decay(images_seen: int, batch: int, half_life: int) -> float:
    """Return the decay of one update of the averaged generators, for a half-life in images.

    While training is young the half-life is a twentieth of the images seen, so that the average forgets the
    initialisation.
    """
    return float(0.5 ** (batch / max(min(half_life, 0.05 * images_seen), 1e-8)))
