"""BraTS 2019: the same as ``mstkd convert brats2019``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("brats2019"))
