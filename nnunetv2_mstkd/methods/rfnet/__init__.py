"""RFNet: fusion of the modalities region by region."""
