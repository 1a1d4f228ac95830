"""Intervals, tests, Shapley values and comparisons of evaluated models."""
