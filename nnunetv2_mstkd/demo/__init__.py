"""The whole method on a fresh machine: data, teacher, student, and what missing modalities cost each of them."""
