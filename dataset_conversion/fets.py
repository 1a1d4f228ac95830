"""Convert a release of FeTS into nnU-Net's raw format, as ``mstkd convert`` does.

python dataset_conversion/fets.py fets2022 SOURCE -d 222
"""

import sys

from nnunetv2_mstkd.dataset_conversion.command import main

if __name__ == "__main__":
    sys.exit(main("fets"))
