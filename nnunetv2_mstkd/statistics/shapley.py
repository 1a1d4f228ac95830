"""The contribution of each modality: exact Shapley values over all subsets.

The modalities are the players of a cooperative game whose value v(S) is the mean metric with the subset S. The Shapley
value (Shapley 1953) of a modality is its mean gain over all orders in which modalities can be added:
phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S)). With 2^C - 1 subsets evaluated nothing
needs to be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import MODEL, REGION, SEPARATOR, first_of
from nnunetv2_mstkd.metrics.conventions import DICE
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
    results: pd.DataFrame, empty_dice: Mapping[tuple[str, str], float] | None = None, *, bootstrap: Bootstrap = DEFAULT
) -> pd.DataFrame:
    """Shapley values of the modalities for Dice, with bootstrap intervals over patients.

    They are from the cases that have all subsets. Without any input nothing is segmented.

    Parameters
    ----------
    results:
        The long table with all 2^C - 1 subsets, C at most 6; see
        :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    empty_dice:
        Dice of a segmentation without any voxel, by case and region, where it is not 0: the rule for two empty masks
        where the reference lacks the region. NaN: the case does not count.

    Returns
    -------
    Table with the columns model, region, modality, value, low, high.

    Raises
    ------
    InputError
        For more than six modalities, missing subsets, or no case that has all of them.
    """
    data = cube(results, DICE).complete_cases()
    # (cases, models, regions, sets), sets in the order of the matrix's columns
    values = data.values[:, :, subset_columns(data)].transpose(1, 0, 3, 2)
    if not data.cases:
        raise InputError("Shapley values need a case that has all modalities; every case lacks some")
    known = empty_dice or {}
    nothing = np.array([[known.get((case, region), 0.0) for region in data.regions] for case in data.cases])
    nothing = np.broadcast_to(nothing[:, None, :, None], (*values.shape[:-1], 1))
    values = np.concatenate([nothing, values], axis=-1)
    matrix = shapley_matrix(len(data.modalities))
    groups = bootstrap.groups(data.cases)
    exact = mean(values, axis=0) @ matrix.T
    low, high = bootstrap.limits(bootstrap.means(values, groups) @ matrix.T, groups)
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
        names = [
            SEPARATOR.join(name for bit, name in enumerate(data.modalities) if code >> bit & 1) for code in missing
        ]
        raise InputError(f"Shapley values need all {len(wanted)} subsets; the results lack {first_of(names)}")
    return np.array([codes.index(code) for code in wanted])
