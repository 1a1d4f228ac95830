"""What all methods share in training."""
