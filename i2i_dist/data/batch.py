"""What the data pipeline hands to training: batches of images with their positions, and samples that were replaced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BadData(Exception):  # noqa: N818 - it tells of the data, and stops nothing
    """A sample that cannot be used; the message is a short reason. Readers replace the sample and report it."""


class BadSample(NamedTuple):
    """A sample that could not be used and was replaced.

    Attributes:
        domain: The reader's name of the domain, "a" or "b".
        key: The sample's key in its source.
        reason: Why it could not be used, in a few words.
        position: The global position it was drawn for.
    """

    domain: str
    key: str
    reason: str
    position: int


class HostBatch(NamedTuple):
    """One micro-batch in host memory; pixels stay uint8 until they are on the device.

    Attributes:
        images: For each domain ("a", "b") uint8 `[N, H, W, 3]`, RGB.
        positions: int64 `[N]`, the global positions of the samples.
        update_position: Global position of the update's first sample.
        bad: The samples that were replaced while this micro-batch was read.
        keys: For each domain the keys of the samples, of substitutes where there are some.
        labels: Of the stream "labelled", uint8 `[N, L]` of 0 and 1, the samples' labels.
        others: Of the stream "labelled", uint8 `[N, L]`, for each sample the labels of another one.
    """

    images: dict[str, Tensor]
    positions: Tensor
    update_position: int
    bad: tuple[BadSample, ...]
    keys: dict[str, list[str]]
    labels: Tensor | None = None
    others: Tensor | None = None

    def pinned(self) -> HostBatch:
        """Return the same in pinned memory, from which a copy to the device does not block."""
        labels, others = (None if numbers is None else numbers.pin_memory() for numbers in (self.labels, self.others))
        images = {domain: pixels.pin_memory() for domain, pixels in self.images.items()}
        return self._replace(images=images, labels=labels, others=others)


class Batch(NamedTuple):
    """One micro-batch on the device.

    Attributes:
        a: float32 `[N, 3, H, W]` in [-1, 1], contiguous.
        b: float32 `[N, 3, H, W]` in [-1, 1], contiguous.
        positions: int64 `[N]` on the CPU, the global positions of the samples.
        update_position: Global position of the update's first sample.
    """

    a: Tensor
    b: Tensor
    positions: Tensor
    update_position: int


class LabelledBatch(NamedTuple):
    """One micro-batch of a domain whose pictures have labels, on the device.

    Attributes:
        images: float32 `[N, 3, H, W]` in [-1, 1], contiguous.
        labels: float32 `[N, L]` of 0 and 1; None of pictures whose labels the method is not told.
        others: float32 `[N, L]`: for each picture the labels of one drawn from those with labels, all alike; or None.
        positions: int64 `[N]` on the CPU, the global positions of the samples.
        update_position: Global position of the update's first sample.
    """

    images: Tensor
    labels: Tensor | None
    others: Tensor | None
    positions: Tensor
    update_position: int


def first_and_last(batch: Batch, group: int) -> tuple[Batch, Batch]:
    """Return the first and the last sample of every `group` consecutive ones; with groups of one, the batch twice."""
    places = (slice(0, None, group), slice(group - 1, None, group))
    first, last = (Batch(batch.a[at], batch.b[at], batch.positions[at], batch.update_position) for at in places)
    return first, last


def to_device(host: HostBatch, device: torch.device) -> Batch | LabelledBatch:
    """Copy the uint8 images to the device and normalise them there: `x / 127.5 - 1`, channels first.

    The copy does not block when the images lie in pinned memory. A domain alone makes a `LabelledBatch`.
    """

    def normalised(domain: str) -> Tensor:
        pixels = host.images[domain].to(device, non_blocking=True).permute(0, 3, 1, 2)  # [N, 3, H, W]
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)

    def numbers(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else labels.to(device, non_blocking=True).float()

    if "b" not in host.images:
        labels, others = numbers(host.labels), numbers(host.others)
        return LabelledBatch(normalised("a"), labels, others, host.positions, host.update_position)
    return Batch(normalised("a"), normalised("b"), host.positions, host.update_position)
