"""The contribution of each modality: exact Shapley values over all subsets.

The modalities are the players of a cooperative game whose value v(S) is the mean metric with the subset S. The Shapley
value (Shapley 1953) of a modality is its mean gain over all orders in which modalities can be added:
phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S)). With 2^C - 1 subsets evaluated nothing
needs to be sampled.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import MODEL, REGION, SEPARATOR
from nnunetv2_mstkd.metrics.conventions import metric_named
from nnunetv2_mstkd.statistics.bootstrap import DEFAULT, Bootstrap, Cube, cube, long_table, mean

MAX_MODALITIES = 6
"""63 subsets, the most that are evaluated by default."""

MODALITY = "modality"


def shapley_matrix(num_modalities: int) -> np.ndarray:
    """The matrix that turns the values of all sets into Shapley values, which add up to v(all) - v(nothing).

    Returns
    -------
    Array of shape (C, 2^C). Bit c of a column's number says whether modality c is in the set.
    """
    codes = np.arange(2**num_modalities)
    sizes = np.array([int(code).bit_count() for code in codes])
    # |S|! (n - |S| - 1)! / n! by |S|
    weights = np.array([1 / (num_modalities * math.comb(num_modalities - 1, s)) for s in range(num_modalities)])
    member = codes >> np.arange(num_modalities)[:, None] & 1 == 1
    # a set counts positively if the modality joined it last, negatively if the modality is yet to join
    return np.where(member, weights[sizes - 1], -weights[np.minimum(sizes, num_modalities - 1)])


def shapley(
    results: pd.DataFrame, *, metric: str = "dice", empty_value: float | None = None, bootstrap: Bootstrap = DEFAULT
) -> pd.DataFrame:
    """Shapley values of the modalities with bootstrap intervals over patients, from the cases that have all subsets.

    Parameters
    ----------
    results:
        The long table with all 2^C - 1 subsets, C at most 6; see
        :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    empty_value:
        v(nothing), the value without any input. Default 0, nothing is segmented, for metrics of which higher is better;
        others have no such value and need one here.

    Returns
    -------
    Table with the columns model, region, modality, value, low, high.

    Raises
    ------
    InputError
        For more than six modalities, missing subsets, no case that has all of them, or a metric that needs
        ``empty_value``.
    """
    if empty_value is None:
        if metric_named(metric).better <= 0:
            raise InputError(f"{metric} without any input has no natural value; give it as empty_value")
        empty_value = 0.0
    data = cube(results, metric).complete_cases()
    # (cases, models, regions, 2^C - 1), sets in the order of the matrix's columns
    values = data.values[:, :, subset_columns(data)].transpose(1, 0, 3, 2)
    if not data.cases:
        raise InputError("Shapley values need a case that has all modalities; every case lacks some")
    matrix = shapley_matrix(len(data.modalities))
    groups = bootstrap.groups(data.cases)
    exact = _apply(matrix, mean(values, axis=0), empty_value)
    low, high = bootstrap.limits(_apply(matrix, bootstrap.means(values, groups), empty_value), groups)
    axes = {MODEL: data.models, REGION: data.regions, MODALITY: data.modalities}
    return long_table(axes, value=exact, low=low, high=high)


def subset_columns(data: Cube) -> np.ndarray:
    """The position of each set of modalities, coded 1 ... 2^C - 1, along the axis of subsets; all must be there."""
    if not 1 <= len(data.modalities) <= MAX_MODALITIES:
        raise InputError(
            f"exact Shapley values are defined here for 1 to {MAX_MODALITIES} modalities ({2**MAX_MODALITIES - 1} "
            f"subsets), found {len(data.modalities)}"
        )
    codes = [sum(1 << data.modalities.index(name) for name in subset.split(SEPARATOR)) for subset in data.subsets]
    wanted = range(1, 2 ** len(data.modalities))
    missing = [code for code in wanted if code not in codes]
    if missing:
        names = ", ".join(
            SEPARATOR.join(name for bit, name in enumerate(data.modalities) if code >> bit & 1) for code in missing[:3]
        )
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"Shapley values need all {len(wanted)} subsets; the results lack {names}{more}")
    return np.array([codes.index(code) for code in wanted])


def _apply(matrix: np.ndarray, values: np.ndarray, empty_value: float) -> np.ndarray:
    """Shapley values, shape (..., C), from the values of the non-empty sets, shape (..., 2^C - 1)."""
    return values @ matrix[:, 1:].T + empty_value * matrix[:, 0]
