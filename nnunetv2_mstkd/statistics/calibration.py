"""Calibration of a model by subset of modalities, from the logits that its evaluation counted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunetv2_mstkd.evaluation.results import subset_size
from nnunetv2_mstkd.metrics.calibration import BINS, expected_calibration_error, fit_temperature


class Calibration:
    """Calibration of a model from the counts of its evaluation.

    Parameters
    ----------
    counts
        By subset and region; see :mod:`nnunetv2_mstkd.metrics.calibration`.

    Attributes
    ----------
    temperatures
        By number of modalities: one for all subsets of that size, and all regions.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.counts = counts
        by_size: dict[int, np.ndarray] = {}
        for subset, regions in counts.items():
            total = by_size.setdefault(subset_size(subset), np.zeros((2, BINS), np.int64))
            for of_region in regions.values():
                total += of_region
        self.temperatures = {size: fit_temperature(total) for size, total in sorted(by_size.items())}

    def error(self, subset: str, region: str, *, calibrated: bool = False) -> float:
        """Expected calibration error, between 0 and 1, of the model, or with its logits divided by the temperature."""
        temperature = self.temperatures[subset_size(subset)] if calibrated else 1.0
        return expected_calibration_error(self.counts[subset][region], temperature)
