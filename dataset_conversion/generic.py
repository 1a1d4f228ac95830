"""Convert your own data, one folder per case, into nnU-Net's raw format, as ``mstkd convert generic`` does.

python dataset_conversion/generic.py SOURCE -d 501 --name MyData --description my_data.json
"""

import sys

from nnunetv2_mstkd.dataset_conversion.command import main

if __name__ == "__main__":
    sys.exit(main("generic"))
