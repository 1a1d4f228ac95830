"""BraTS 2024 GLI (adult glioma after treatment): the same as ``mstkd convert brats2024_gli``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("brats2024_gli"))
