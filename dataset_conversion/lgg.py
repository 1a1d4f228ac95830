"""Convert the LGG MRI segmentation set into nnU-Net's raw format, as ``mstkd convert`` does.

python dataset_conversion/lgg.py lgg SOURCE -d 500
"""

import sys

from nnunetv2_mstkd.dataset_conversion.command import main

if __name__ == "__main__":
    sys.exit(main("lgg"))
