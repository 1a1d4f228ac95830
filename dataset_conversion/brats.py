"""Convert a release of BraTS into nnU-Net's raw format, as ``mstkd convert`` does.

python dataset_conversion/brats.py brats2021 SOURCE -d 226
"""

import sys

from nnunetv2_mstkd.dataset_conversion.command import main

if __name__ == "__main__":
    sys.exit(main("brats"))
