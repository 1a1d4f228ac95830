"""Losses that two or more methods share: pure functions of tensors.

A term compares a student (missing modalities) with a teacher (all modalities), detaches the teacher itself, computes in
float32 outside autocast whatever it is given, and returns a float32 scalar. Nothing here reads a file, keeps a state or
knows a trainer.
"""
