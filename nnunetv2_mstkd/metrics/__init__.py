"""Segmentation metrics and the conventions for empty masks."""
