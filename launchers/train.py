"""Train: `deepspeed launchers/train.py --config configs/demo.yaml`; also under torchrun, srun and plain python."""

import contextlib
import logging
import os
import sys

# Before torch loads MKL: its sums then come out the same in every run on a machine.
os.environ.setdefault("MKL_CBWR", "AUTO")

from i2i_dist.stopping import launchers

if __name__ == "__main__":
    started_by = launchers()
    from i2i_dist.train import main  # not before: it loads torch, and takes seconds in which a launcher may end

    code = main(launchers=started_by)
    with contextlib.suppress(OSError):  # a console that is gone must not change the code
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    # Without Python's own ending: a thread that the communication library still runs then can abort the process, and
    # a run that has ended well, with everything on the disk, would be reported as failed.
    os._exit(code)
