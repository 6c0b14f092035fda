"""Ops with kernels of their own; each is a plain function, and `reference` holds its definition."""

from i2i_dist.ops._library import KERNELS, Choice, build_info, choose, implementations
from i2i_dist.ops.adalin import adalin, iln
from i2i_dist.ops.instance_norm_act import instance_norm_act
from i2i_dist.ops.patch_gather import patch_gather
from i2i_dist.ops.patch_nce import l2_normalize, patch_nce_loss, patch_nce_losses

__all__ = [
    "KERNELS",
    "Choice",
    "adalin",
    "build_info",
    "choose",
    "iln",
    "implementations",
    "instance_norm_act",
    "l2_normalize",
    "patch_gather",
    "patch_nce_loss",
    "patch_nce_losses",
]
