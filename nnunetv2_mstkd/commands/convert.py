"""``mstkd convert``: turn a data set into nnU-Net's raw format."""

from nnunetv2_mstkd.dataset_conversion.command import add_converters as add_arguments
from nnunetv2_mstkd.dataset_conversion.command import run

__all__ = ["add_arguments", "run"]
