"""MSD Task01 BrainTumour: the same as ``mstkd convert msd_task01``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("msd_task01"))
