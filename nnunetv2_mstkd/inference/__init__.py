"""Predicting cases with any subset of the modalities, with nnU-Net's own predictor and exporter."""
