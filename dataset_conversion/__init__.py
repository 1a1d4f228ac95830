"""Converters into nnU-Net's raw format, installed as ``nnunetv2_mstkd.dataset_conversion``."""
