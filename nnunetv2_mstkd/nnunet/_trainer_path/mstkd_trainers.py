"""Where nnU-Net finds the trainers of nnunetv2_mstkd by name; they are defined in the installed package."""

from nnunetv2_mstkd.errors import install_excepthook
from nnunetv2_mstkd.methods import *  # noqa: F403  (everything in nnunetv2_mstkd.methods.__all__)

# the only module of this package that nnU-Net's commands import
install_excepthook()
