"""Intervals that include the variation between training runs, which are a random sample of what a trainer produces.

All cases share the luck of a training run, so resampling the cases cannot see it. A difference between *methods* needs
several training runs of each, and an interval that contains both sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def widen(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, samples: Sequence[np.ndarray], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Widen an interval over patients, for fixed networks, to one over patients and training runs.

    Each independent sample of runs adds the half-width of its t interval in quadrature:
    low' = value - sqrt((value - low)^2 + sum_k (t_k s_k)^2 / S_k), with the standard deviation s_k over S_k runs
    and the quantile t_k for S_k - 1 degrees of freedom. This is Cochran's approximation to the Behrens-Fisher problem
    (Cochran, Biometrics 20:191, 1964): exact where one source dominates and conservative in between. A bootstrap over
    three runs is too narrow (documentation/decisions.md).

    Parameters
    ----------
    value, low, high:
        Estimates and their limits over patients, of shape (...).
    samples:
        Estimates by training, each of shape (trainings, ...) with at least two trainings: the differences of paired
        trainings, or one sample per model; empty: nothing is added.
    level:
        Coverage of the interval over patients, and of the result.

    Returns
    -------
    Lower and upper limits, of shape (...).
    """
    if not samples:
        return low, high
    added = sum(
        stats.t.ppf((1 + level) / 2, len(each) - 1) ** 2 * np.var(each, axis=0, ddof=1) / len(each) for each in samples
    )
    # the limit of a percentile interval may lie on the other side of the estimate
    below, above = np.maximum(value - low, 0), np.maximum(high - value, 0)
    return value - np.sqrt(below**2 + added), value + np.sqrt(above**2 + added)
