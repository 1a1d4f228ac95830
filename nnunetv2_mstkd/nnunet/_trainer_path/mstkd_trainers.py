"""Where nnU-Net finds the trainers of nnunetv2_mstkd, and of packages that register theirs, by name."""

try:
    from nnunetv2_mstkd.errors import install_excepthook
    from nnunetv2_mstkd.methods.registry import trainers
except ModuleNotFoundError as error:
    if error.name == "nnunetv2_mstkd":  # the variable was inherited from another environment: nnU-Net skips this file
        raise ModuleNotFoundError(str(error), name=__name__) from error
    raise

# nnU-Net looks for an attribute of this module; the classes are defined in installed packages
globals().update(trainers())
# the only module of this package that nnU-Net's commands import
install_excepthook()
