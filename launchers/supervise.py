"""Supervise a run: `python launchers/supervise.py --restarts 3 -- deepspeed launchers/train.py --config FILE`."""

import sys

from i2i_dist.supervise import main

if __name__ == "__main__":
    sys.exit(main())
