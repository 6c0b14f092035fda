"""Say which implementation of each op runs on this machine, and why: `python launchers/doctor.py`."""

import sys

from i2i_dist.doctor import main

if __name__ == "__main__":
    sys.exit(main())
