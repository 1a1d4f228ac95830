"""BraTS 2025 MET (metastases): the same as ``mstkd convert brats2025_met``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("brats2025_met"))
