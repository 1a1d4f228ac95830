"""Measuring segmentations: metrics and their conventions."""
