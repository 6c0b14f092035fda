"""Supervise a run: `python launchers/supervise.py --restarts 3 -- deepspeed launchers/train.py --config FILE`."""

import contextlib
import os
import sys

from i2i_dist.supervise import main

if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # Python's own ending may answer 120 where the console is gone
