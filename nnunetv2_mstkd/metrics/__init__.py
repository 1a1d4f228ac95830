"""Segmentation metrics: overlap, surface distances, lesion-wise scores, and their conventions for empty masks."""
