"""BraTS 2023 MEN (meningioma): the same as ``mstkd convert brats2023_men``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("brats2023_men"))
