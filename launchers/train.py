"""Train: `deepspeed launchers/train.py --config configs/demo.yaml`; also under torchrun, srun and plain python."""

import os
import sys

# Before torch loads MKL: its sums then come out the same in every run on a machine.
os.environ.setdefault("MKL_CBWR", "AUTO")

from i2i_dist.train import main

if __name__ == "__main__":
    sys.exit(main())
