"""Synthetic brains with tumors, in the four BraTS modalities, for tests, demonstrations and method comparisons.

A phantom reproduces which modality shows which region. Numbers measured on it say nothing about clinical performance.
"""

from __future__ import annotations

from nnunetv2_mstkd.phantom.case import Case, make_case
from nnunetv2_mstkd.phantom.dataset import write_dataset

__all__ = ["Case", "make_case", "write_dataset"]
