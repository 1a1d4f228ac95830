"""Networks built from nnU-Net plans, and the modules that training adds to them."""
