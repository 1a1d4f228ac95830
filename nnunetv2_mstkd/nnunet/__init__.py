"""Everything that knows nnU-Net's files and names."""
