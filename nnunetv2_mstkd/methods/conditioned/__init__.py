"""Modality dropout with a network that is conditioned on the available modalities."""
