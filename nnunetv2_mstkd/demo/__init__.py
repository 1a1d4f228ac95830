"""The main job on a fresh machine: data, teacher, student, and what missing modalities cost each of them."""
