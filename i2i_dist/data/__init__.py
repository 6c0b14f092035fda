"""Data: sources of images, their order, and the micro-batches that training reads."""

from __future__ import annotations

from i2i_dist.data.batch import BadData, BadSample, Batch, HostBatch, to_device
from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.index import Source
from i2i_dist.data.order import SampleOrder
from i2i_dist.data.reader import UnpairedReader, micro_batches
from i2i_dist.data.transforms import Transform

__all__ = [
    "BadData",
    "BadSample",
    "Batch",
    "HostBatch",
    "SampleOrder",
    "Source",
    "Transform",
    "UnpairedReader",
    "decode_image",
    "micro_batches",
    "open_source",
    "to_device",
]
