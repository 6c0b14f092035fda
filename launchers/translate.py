"""Translate pictures with a trained generator: `python launchers/translate.py RUN PICTURES RESULTS`."""

import sys

from i2i_dist.translate import main

if __name__ == "__main__":
    sys.exit(main())
