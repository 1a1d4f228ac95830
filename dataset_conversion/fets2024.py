"""FeTS 2024: the same as ``mstkd convert fets2024``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("fets2024"))
