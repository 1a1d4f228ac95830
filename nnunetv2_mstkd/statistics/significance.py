"""Paired comparisons of models over all subsets of modalities: intervals, Wilcoxon tests, Holm's correction, ranks.

All functions take the long table of :mod:`~nnunetv2_mstkd.evaluation.results`, the models to use (default all) and the
baseline that all others are compared with (default: all pairs are compared), and return a table. A difference is model
- against; a value that one of the two lacks (NaN) is left out of both. A case that lacks modalities counts with the
subsets that it has. Volume errors are compared by absolute value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import CASE, MODALITIES, MODEL, REGION, SUBSET
from nnunetv2_mstkd.statistics.bootstrap import (
    DEFAULT,
    HIGH,
    LOW,
    Bootstrap,
    Cube,
    badness,
    cube,
    long_table,
    mean,
    unsigned,
    with_average,
)

DIFFERENCE = "difference"
AGAINST = "against"
P = "p"
P_CORRECTED = "p_corrected"


def compare(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    models: Sequence[str] | None = None,
    baseline: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> pd.DataFrame:
    """Paired comparison of models; the value of a case is its mean over the subsets.

    The two-sided Wilcoxon signed-rank test assumes independent differences, so it gets one per patient. Its p-values
    are corrected by Holm (1979) over all rows.

    Returns
    -------
    Table with the columns model, against, region (each one and their ``average``), difference, low, high, p,
    p_corrected, cases, patients.
    """
    data, pairs, differences = _paired(results, metric, models, baseline)
    differences, regions = with_average(differences, data.regions)
    per_case, groups = mean(differences, axis=2), bootstrap.groups(data.cases)
    value, low, high = bootstrap.estimates(per_case, data.cases)
    p_values = np.apply_along_axis(wilcoxon, 1, per_case, groups)
    used = ~np.isnan(per_case)
    columns = {
        DIFFERENCE: value,
        LOW: low,
        HIGH: high,
        P: p_values,
        P_CORRECTED: holm(p_values)[0],
        "cases": used.sum(axis=1),
        "patients": np.apply_along_axis(lambda of_case: len(np.unique(groups[of_case])), 1, used),
    }
    return _table_of_pairs(pairs, {REGION: regions}, columns)


def paired_differences(
    results: pd.DataFrame, *, metric: str = "dice", models: Sequence[str] | None = None, baseline: str | None = None
) -> pd.DataFrame:
    """The differences behind :func:`compare`, case by case.

    Returns
    -------
    Table with the columns model, against, case, region (each one and their ``average``), difference.
    """
    data, pairs, differences = _paired(results, metric, models, baseline)
    differences, regions = with_average(differences, data.regions)
    return _table_of_pairs(pairs, {CASE: data.cases, REGION: regions}, {DIFFERENCE: mean(differences, axis=2)})


def compare_subsets(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    models: Sequence[str] | None = None,
    baseline: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> pd.DataFrame:
    """Paired comparison of models subset by subset, with tests and intervals corrected within each pair of models.

    There are m = subsets x regions comparisons. The interval of the k-th smallest p-value has the level
    1 - (1 - level) / (m - k + 1) at which Holm's step-down procedure examines it, so that intervals and tests agree. It
    does not follow that all intervals hold together with probability ``level``.

    Returns
    -------
    Table with the columns model, against, subset, modalities, region, difference, low, high, level, p, p_corrected.
    """
    data, pairs, differences = _paired(results, metric, models, baseline)
    tested = _tested(differences, data.cases, bootstrap)
    return _table_of_pairs(pairs, {SUBSET: data.subsets, REGION: data.regions}, tested)


def compare_by_count(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    models: Sequence[str] | None = None,
    baseline: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> pd.DataFrame:
    """Paired comparison of models by number of available modalities; corrected as in :func:`compare_subsets`.

    The value of a case is its mean over the subsets of that size.

    Returns
    -------
    Table with the columns model, against, modalities, region (each one and their ``average``), difference, low, high,
    level, p, p_corrected.
    """
    data, pairs, differences = _paired(results, metric, models, baseline)
    differences, regions = with_average(differences, data.regions)
    sizes, per_case = data.by_size(differences)
    return _table_of_pairs(pairs, {MODALITIES: sizes, REGION: regions}, _tested(per_case, data.cases, bootstrap))


def rank_table(
    results: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("dice",),
    models: Sequence[str] | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> pd.DataFrame:
    """Rank models as BraTS does, with the stability of the ranking.

    Models are ranked within each case, subset, region and metric, ties sharing their mean rank; the mean of these ranks
    decides. Stability as in Wiesenfarth et al., Sci. Rep. 11:2369 (2021): the ranking is repeated on resampled
    patients.

    Returns
    -------
    Table, best model first, with the columns model, rank, mean_rank, low, high (interval of the rank), first (fraction
    of resamples in which the model, alone or tied, is best).

    Raises
    ------
    InputError
        With fewer than two models, for NaN values, which have no rank (use the convention "brats"), and if metrics were
        evaluated on different cases.
    """
    ranks: list[np.ndarray] = []
    names: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    for metric in metrics:
        data = cube(results, metric, models=models)
        if np.isnan(data.values[:, data.evaluated]).any():
            raise InputError(
                f"the results have {metric} values that are left out (nan), and these have no rank; evaluate with the "
                f"convention brats"
            )
        if names and (names, cases) != (data.models, data.cases):
            raise InputError(f"{metrics[0]} and {metric} were not evaluated for the same models and cases")
        names, cases = data.models, data.cases
        # (models, cases): the rank among models, averaged over subsets and regions; NaN, without a subset, has no rank
        ranks.append(mean(stats.rankdata(badness(data.values, metric), axis=0), axis=(2, 3)))
    if len(names) < 2:
        raise InputError(f"a ranking needs at least two models, found {', '.join(names) or 'no metric'}")
    per_case = np.mean(ranks, axis=0)
    groups = bootstrap.groups(cases)
    means = per_case.mean(axis=1)
    # rounded: means of the same ranks in another order must tie
    resampled = stats.rankdata(bootstrap.means(per_case.T, groups).round(9), axis=1, method="min").astype(float)
    low, high = bootstrap.limits(resampled, groups)
    first = (resampled == 1).mean(axis=0)
    places = stats.rankdata(means.round(9), method="min").astype(int)
    table = long_table({MODEL: names}, rank=places, mean_rank=means, low=low, high=high, first=first)
    return table.sort_values("mean_rank", kind="stable", ignore_index=True)


# ---- tests and corrections -----------------------------------------------------------------------------------------


def wilcoxon(differences: np.ndarray, patients: np.ndarray) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test on the patients' mean differences.

    Parameters
    ----------
    differences:
        Shape (cases,); NaN are left out, zeros are dropped as Wilcoxon did.
    patients:
        Shape (cases,), a number per patient.

    Returns
    -------
    The p-value; 1 if all differences are zero, NaN if there are none.
    """
    used = ~np.isnan(differences)
    if not used.any():
        return float("nan")
    _, numbers, cases = np.unique(patients[used], return_inverse=True, return_counts=True)
    # rounded: equal differences must tie, and those that cancel must be zero
    means = (np.bincount(numbers, differences[used]) / cases).round(9)
    return float(stats.wilcoxon(means).pvalue) if means.any() else 1.0


def holm(p_values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Correct p-values for their number by Holm's procedure (1979).

    Parameters
    ----------
    p_values:
        Any shape; NaN are no tests and stay NaN.
    level:
        Coverage of an uncorrected interval.

    Returns
    -------
    Corrected p-values and the corrected levels of the matching intervals, of the same shape.
    """
    flat = np.ravel(p_values)
    adjusted = np.full(len(flat), np.nan)
    tested = np.flatnonzero(~np.isnan(flat))
    factors = np.full(len(flat), max(1, len(tested)), dtype=float)
    order = tested[np.argsort(flat[tested], kind="stable")]
    factors[order] = len(tested) - np.arange(len(tested))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(flat[order] * factors[order]))
    return adjusted.reshape(np.shape(p_values)), (1 - (1 - level) / factors).reshape(np.shape(p_values))


def _tested(differences: np.ndarray, cases: Sequence[str], bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """Mean, interval and test of differences (pairs, cases, K, regions), by column; corrected within each pair."""
    p_values = np.apply_along_axis(wilcoxon, 1, differences, bootstrap.groups(cases))
    corrected, levels = (
        np.stack(part) for part in zip(*(holm(of_pair, bootstrap.level) for of_pair in p_values), strict=True)
    )
    # pair by pair: the resamples of all of them could fill memory
    estimates = [
        bootstrap.estimates(of_pair[None], cases, level[None])
        for of_pair, level in zip(differences, levels, strict=True)
    ]
    value, low, high = (np.concatenate(part) for part in zip(*estimates, strict=True))
    return {DIFFERENCE: value, LOW: low, HIGH: high, "level": levels, P: p_values, P_CORRECTED: corrected}


# ---- pairs ---------------------------------------------------------------------------------------------------------


def _paired(
    results: pd.DataFrame, metric: str, models: Sequence[str] | None, baseline: str | None
) -> tuple[Cube, list[tuple[str, str]], np.ndarray]:
    """The values, the two models of each comparison, and differences of shape (pairs, cases, subsets, regions)."""
    data = cube(results, metric, models=models)
    if len(data.models) < 2:
        raise InputError(f"a comparison needs at least two models, found {', '.join(data.models)}")
    if baseline is None:
        pairs = list(itertools.combinations(data.models, 2))
    elif baseline in data.models:
        pairs = [(name, baseline) for name in data.models if name != baseline]
    else:
        raise InputError(f"the results have no model {baseline}; they have {', '.join(data.models)}")
    of_model = dict(zip(data.models, unsigned(data.values, metric), strict=True))
    return data, pairs, np.stack([of_model[model] - of_model[against] for model, against in pairs])


def _table_of_pairs(
    pairs: Sequence[tuple[str, str]], axes: Mapping[str, Iterable], columns: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """A row per pair of models and element along ``axes``."""
    table = long_table({"pair": range(len(pairs)), **axes}, **columns)
    numbers = table.pop("pair")
    for place, name in enumerate((MODEL, AGAINST)):
        table.insert(place, name, [pairs[number][place] for number in numbers])
    return table
