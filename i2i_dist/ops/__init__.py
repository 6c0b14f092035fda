"""Ops with kernels of their own; each is a plain function, and `reference` holds its definition."""

from i2i_dist.ops._library import build_info
from i2i_dist.ops.patch_nce import l2_normalize, patch_nce_loss

__all__ = ["build_info", "l2_normalize", "patch_nce_loss"]
