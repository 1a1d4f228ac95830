"""Cross-validation of several trainers as one plan of steps, on this machine or on a cluster."""
