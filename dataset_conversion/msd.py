"""Convert Task01 of the Medical Segmentation Decathlon into nnU-Net's raw format, as ``mstkd convert`` does.

python dataset_conversion/msd.py msd_task01 SOURCE -d 101
"""

import sys

from nnunetv2_mstkd.dataset_conversion.command import main

if __name__ == "__main__":
    sys.exit(main("msd"))
