"""Predicting cases whose modalities are partly absent, with nnU-Net's own predictor and exporter."""
