"""BraTS 2023 GLI (adult glioma before treatment): the same as ``mstkd convert brats2023_gli``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("brats2023_gli"))
