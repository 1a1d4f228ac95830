"""FeTS 2022: the same as ``mstkd convert fets2022``, as a script."""

import sys

from nnunetv2_mstkd.dataset_conversion.options import main

if __name__ == "__main__":
    sys.exit(main("fets2022"))
