"""Convert official checkpoints, there and back: `python launchers/convert.py --from dclgan checkpoints/x runs/x`."""

import sys

from i2i_dist.convert import main

if __name__ == "__main__":
    sys.exit(main())
