"""Whether stated probabilities hold: expected calibration error, and the temperature that makes it smaller.

Everything is computed from counts of logits, so that no probability map has to be kept (Guo et al., "On Calibration of
Modern Neural Networks", ICML 2017). The background of a medical image is certain almost everywhere and would make any
model look calibrated, so only voxels count to which the model gives a region at least 1 %.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

LEAST = 0.01
"""Probability from which a voxel counts."""
LOWEST, HIGHEST = float(np.log(LEAST / (1 - LEAST))), 20.0
WIDTH = 0.1
"""Of the bins of logits: a probability changes by at most 0.025 within one."""
BINS = int(np.ceil((HIGHEST - LOWEST) / WIDTH))
CENTRES = LOWEST + WIDTH * (np.arange(BINS) + 0.5)
"""Logit at the centre of each bin."""
ECE_BINS = 15
"""Bins of equal width of the probability in the expected calibration error, as in the paper."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.2, 10.0
"""Limits of the temperature."""


def logit_counts(logits: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Count the voxels of a binary decision by their logit.

    Parameters
    ----------
    logits
        Log-odds of the region, any shape. Those of less than 1 % do not count, those above 20 count as 20.
    positive
        Whether the reference has the region, bool of the same shape.

    Returns
    -------
    Integers, shape (2, BINS): all voxels, and those in the reference, by bins of :data:`WIDTH` from ``LOWEST`` on.
    """
    counted = logits >= LOWEST
    bins = ((logits[counted].clip(max=HIGHEST) - LOWEST) / WIDTH).astype(np.int64).clip(0, BINS - 1)
    positives = bins[positive[counted]]
    return np.stack([np.bincount(each, minlength=BINS) for each in (bins, positives)])


def expected_calibration_error(counts: np.ndarray, temperature: float = 1.0) -> float:
    """Mean distance between stated probability and observed frequency, between 0 and 1 (eq. 3 of the paper).

    Parameters
    ----------
    counts
        From :func:`logit_counts`; those of several cases may be added.
    temperature
        The logits are divided by it.

    Returns
    -------
    NaN where no voxel counts.
    """
    number, positives = counts
    if not number.sum():
        return float("nan")
    stated = expit(CENTRES / temperature)
    group = np.minimum((stated * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(group, positives - number * stated, ECE_BINS)
    return float(np.abs(gaps).sum() / number.sum())


def fit_temperature(counts: np.ndarray) -> float:
    """The temperature with the highest likelihood of the reference: above 1, the model was too certain.

    Parameters
    ----------
    counts
        From :func:`logit_counts`, those of all cases and regions added.

    Returns
    -------
    Between 0.2 and 10; 1 where nothing can be fitted, because no voxel counts.
    """
    number, positives = counts
    if not number.sum():
        return 1.0

    def loss(log_temperature: float) -> float:
        z = CENTRES / np.exp(log_temperature)
        return float((positives * np.logaddexp(0, -z) + (number - positives) * np.logaddexp(0, z)).sum() / number.sum())

    found = minimize_scalar(loss, bounds=(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE)), method="bounded")
    return float(np.exp(found.x))
