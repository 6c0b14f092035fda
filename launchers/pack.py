"""Packs a folder of images into WebDataset shards: `python launchers/pack.py SOURCE TARGET`."""

from __future__ import annotations

import sys

from i2i_dist.data.pack import main

if __name__ == "__main__":
    sys.exit(main())
