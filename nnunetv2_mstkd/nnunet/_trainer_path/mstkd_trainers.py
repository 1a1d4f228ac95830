"""Where nnU-Net finds the trainers of nnunetv2_mstkd, and of packages that register theirs, by name."""

from nnunetv2_mstkd.errors import install_excepthook
from nnunetv2_mstkd.methods.registry import trainers

# nnU-Net looks for an attribute of this module; the classes are defined in installed packages
globals().update(trainers())
# the only module of this package that nnU-Net's commands import
install_excepthook()
