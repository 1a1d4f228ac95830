"""Missing-modality segmentation for nnU-Net v2.

This module is imported at every interpreter start of an environment that has the package installed (see
:mod:`nnunetv2_mstkd.nnunet.registration`), so it holds the version and imports nothing.
"""

__version__ = "0.1.0"
