"""SMML."""
