"""MedMAP."""
