"""Converters from releases of public data sets, and from your own data, to nnU-Net's raw format."""
