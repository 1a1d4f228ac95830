"""BraTS 2021: the same as ``mstkd convert brats2021``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("brats2021"))
