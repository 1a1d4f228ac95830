"""Summaries of a model and paired comparisons of models over all subsets of modalities.

All functions take the long table of :mod:`~nnunetv2_mstkd.evaluation.results` and return a table. Intervals are over
resampled patients: pass a :class:`~nnunetv2_mstkd.statistics.bootstrap.Bootstrap` with ``patients`` if a patient has
several cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import CASE, MODALITIES, MODEL, REGION, SEPARATOR, SUBSET
from nnunetv2_mstkd.metrics.conventions import metric_named
from nnunetv2_mstkd.statistics.bootstrap import AVERAGE, Bootstrap, Cube, cube, long_table, mean

LOW = "low"
HIGH = "high"
DIFFERENCE = "difference"
AGAINST = "against"
P = "p"
P_CORRECTED = "p_corrected"

DEFAULT = Bootstrap()


# ---- one model -----------------------------------------------------------------------------------------------------


def summary(results: pd.DataFrame, *, metric: str = "dice", bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Mean over all subsets with its interval, and the worst subset.

    Returns
    -------
    Table with the columns model, region (each one and their ``average``), value, low, high, worst_subset, worst.
    """
    data = cube(results, metric)
    everything, regions = _with_average(data.values, data.regions)
    value, low, high = _estimates(mean(everything, axis=2), data.cases, bootstrap)
    by_subset = mean(everything, axis=1)
    # NaN is never the worst; if there is nothing else, the first subset is
    places = np.nan_to_num(_badness(by_subset, metric), nan=-np.inf).argmax(axis=1)
    worst = np.take_along_axis(by_subset, places[:, None], axis=1)
    names = np.array(data.subsets)[places]
    axes = {MODEL: data.models, REGION: regions}
    return long_table(axes, value=value, low=low, high=high, worst_subset=names, worst=worst)


def mean_by_count(results: pd.DataFrame, *, metric: str = "dice", bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Mean by number of available modalities, over all subsets of that size.

    Returns
    -------
    Table with the columns model, region (each one and their ``average``), modalities, value, low, high.
    """
    data = cube(results, metric)
    everything, regions = _with_average(data.values, data.regions)
    sizes = np.unique(data.sizes)
    per_case = np.stack([mean(everything[:, :, data.sizes == size], axis=2) for size in sizes], axis=2)
    value, low, high = (part.swapaxes(1, 2) for part in _estimates(per_case, data.cases, bootstrap))
    axes = {MODEL: data.models, REGION: regions, MODALITIES: sizes}
    return long_table(axes, value=value, low=low, high=high)


def gap_to_full(results: pd.DataFrame, *, metric: str = "dice", bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """The loss of each subset against the full input, case by case.

    Returns
    -------
    Table with the columns model, region (each one and their ``average``), subset, modalities, value, low, high. A
    positive value is a loss, whichever direction of the metric is better.
    """
    data = cube(results, metric)
    badness = _badness(data.values, metric)
    # the full input is the last subset
    gaps, regions = _with_average(badness[:, :, : data.full] - badness[:, :, [data.full]], data.regions)
    value, low, high = (part.swapaxes(1, 2) for part in _estimates(gaps, data.cases, bootstrap))
    axes = {MODEL: data.models, REGION: regions, SUBSET: data.subsets[: data.full]}
    return _with_sizes(long_table(axes, value=value, low=low, high=high))


# ---- several models ------------------------------------------------------------------------------------------------


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

    Parameters
    ----------
    results:
        The long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    metric:
        Name of the metric. Volume errors are compared by absolute value.
    models:
        Two or more models; default all.
    baseline:
        The model that all others are compared with; default: all pairs are compared.
    bootstrap:
        The bootstrap of the intervals.

    Returns
    -------
    Table with the columns model, against, region (each one and their ``average``), difference (model - against), low,
    high, p, p_corrected, cases, patients. A value that one of the two models lacks (NaN) is left out of both.
    """
    data = cube(results, metric, models=models)
    pairs = _pairs(data.models, baseline)
    per_case, regions = _differences(data, metric, pairs)
    groups = bootstrap.groups(data.cases)
    values, low, high = _estimates(per_case, data.cases, bootstrap)
    rows = []
    for k, (first, second) in enumerate(pairs):
        for r, region in enumerate(regions):
            used = ~np.isnan(per_case[k, :, r])
            numbers = int(used.sum()), len(np.unique(groups[used]))
            estimate = values[k, r], low[k, r], high[k, r], wilcoxon(per_case[k, :, r], groups)
            rows.append((data.models[first], data.models[second], region, *estimate, *numbers))
    table = pd.DataFrame(rows, columns=[MODEL, AGAINST, REGION, DIFFERENCE, LOW, HIGH, P, "cases", "patients"])
    table.insert(table.columns.get_loc(P) + 1, P_CORRECTED, holm(table[P].to_numpy())[0])
    return table


def paired_differences(
    results: pd.DataFrame, *, metric: str = "dice", models: Sequence[str] | None = None, baseline: str | None = None
) -> pd.DataFrame:
    """The differences behind :func:`compare`, case by case.

    Returns
    -------
    Table with the columns model, against, case, region (each one and their ``average``), difference (model - against).
    """
    data = cube(results, metric, models=models)
    pairs = _pairs(data.models, baseline)
    per_case, regions = _differences(data, metric, pairs)
    tables = []
    for (first, second), differences in zip(pairs, per_case, strict=True):
        table = long_table({CASE: data.cases, REGION: regions}, difference=differences)
        table.insert(0, MODEL, data.models[first])
        table.insert(1, AGAINST, data.models[second])
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def compare_subsets(
    results: pd.DataFrame, model: str, against: str, *, metric: str = "dice", bootstrap: Bootstrap = DEFAULT
) -> pd.DataFrame:
    """Paired comparison of two models subset by subset, with corrected tests and intervals.

    There are m = subsets x regions comparisons. The interval of the k-th smallest p-value has the level
    1 - (1 - level) / (m - k + 1) at which Holm's step-down procedure examines it, so that intervals and tests agree. It
    does not follow that all intervals hold together with probability ``level``.

    Returns
    -------
    Table with the columns subset, modalities, region, difference (model - against), low, high, level, p, p_corrected.
    """
    data = cube(results, metric, models=[model, against])
    unsigned = _unsigned(data.values, metric)
    tested = _tested(unsigned[0] - unsigned[1], data.cases, bootstrap)
    return _with_sizes(long_table({SUBSET: data.subsets, REGION: data.regions}, **tested))


def compare_by_count(
    results: pd.DataFrame, model: str, against: str, *, metric: str = "dice", bootstrap: Bootstrap = DEFAULT
) -> pd.DataFrame:
    """Paired comparison of two models by number of available modalities; see :func:`compare_subsets`.

    The value of a case is its mean over the subsets of that size. Tests and intervals are corrected for the number of
    sizes x regions.

    Returns
    -------
    Table with the columns modalities, region (each one and their ``average``), difference (model - against), low, high,
    level, p, p_corrected.
    """
    data = cube(results, metric, models=[model, against])
    unsigned = _unsigned(data.values, metric)
    differences, regions = _with_average(unsigned[0] - unsigned[1], data.regions)
    sizes = np.unique(data.sizes)
    per_case = np.stack([mean(differences[:, data.sizes == size], axis=1) for size in sizes], axis=1)
    return long_table({MODALITIES: sizes, REGION: regions}, **_tested(per_case, data.cases, bootstrap))


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
        if np.isnan(data.values).any():
            raise InputError(
                f"the results have {metric} values that are left out (nan), and these have no rank; evaluate with the "
                f"convention brats"
            )
        if names and (names, cases) != (data.models, data.cases):
            raise InputError(f"{metrics[0]} and {metric} were not evaluated for the same models and cases")
        names, cases = data.models, data.cases
        # (models, cases): the rank among models, averaged over subsets and regions
        ranks.append(stats.rankdata(_badness(data.values, metric), axis=0).mean(axis=(2, 3)))
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
    rows = zip(names, places, means, low, high, first, strict=True)
    table = pd.DataFrame(rows, columns=[MODEL, "rank", "mean_rank", LOW, HIGH, "first"])
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
    numbers = patients[used]
    means = np.bincount(numbers, differences[used])[np.unique(numbers)] / np.bincount(numbers)[np.unique(numbers)]
    return float(stats.wilcoxon(means).pvalue) if means.any() else 1.0


def holm(p_values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Correct p-values for their number by Holm's procedure (1979).

    Parameters
    ----------
    p_values:
        Shape (m,); NaN are no tests and stay NaN.
    level:
        Coverage of an uncorrected interval.

    Returns
    -------
    Corrected p-values and the corrected levels of the matching intervals, shape (m,) each.
    """
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    factors = np.full(len(p_values), max(1, len(tested)), dtype=float)
    order = tested[np.argsort(p_values[tested], kind="stable")]
    factors[order] = len(tested) - np.arange(len(tested))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * factors[order]))
    return adjusted, 1 - (1 - level) / factors


def _estimates(
    values: np.ndarray, cases: Sequence[str], bootstrap: Bootstrap, level: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over the cases with lower and upper limits.

    Parameters
    ----------
    values:
        Shape (N, cases, ...).
    level:
        Coverage of each interval, shape (N, ...); default that of the bootstrap.

    Returns
    -------
    Three arrays of shape (N, ...).
    """
    by_case = np.moveaxis(values, 1, 0)
    groups = bootstrap.groups(cases)
    return mean(by_case, axis=0), *bootstrap.limits(bootstrap.means(by_case, groups), groups, level)


def _tested(differences: np.ndarray, cases: Sequence[str], bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """Means of paired differences, shape (cases, K, regions), with corrected intervals and tests.

    Returns
    -------
    Arrays of shape (K, regions) by the columns of a table.
    """
    shape = differences.shape[1:]
    groups = bootstrap.groups(cases)
    p_values = np.array([wilcoxon(column, groups) for column in differences.reshape(len(differences), -1).T])
    adjusted, levels = (part.reshape(shape) for part in holm(p_values, bootstrap.level))
    value, low, high = (part[0] for part in _estimates(differences[None], cases, bootstrap, levels[None]))
    intervals = {DIFFERENCE: value, LOW: low, HIGH: high, "level": levels}
    return {**intervals, P: p_values.reshape(shape), P_CORRECTED: adjusted}


def _with_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Insert the number of modalities behind each subset."""
    sizes = [subset.count(SEPARATOR) + 1 for subset in table[SUBSET]]
    table.insert(table.columns.get_loc(SUBSET) + 1, MODALITIES, sizes)
    return table


def _differences(data: Cube, metric: str, pairs: Sequence[tuple[int, int]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Differences of the means over all subsets, shape (pairs, cases, regions), and the names of the regions."""
    values = _unsigned(data.values, metric)
    differences, regions = _with_average(np.stack([values[a] - values[b] for a, b in pairs]), data.regions)
    return mean(differences, axis=2), regions


def _pairs(models: Sequence[str], baseline: str | None) -> list[tuple[int, int]]:
    """Positions of the models of each comparison."""
    if len(models) < 2:
        raise InputError(f"a comparison needs at least two models, found {', '.join(models)}")
    if baseline is None:
        return list(itertools.combinations(range(len(models)), 2))
    if baseline not in models:
        raise InputError(f"the results have no model {baseline}; they have {', '.join(models)}")
    return [(number, models.index(baseline)) for number, name in enumerate(models) if name != baseline]


def _with_average(values: np.ndarray, regions: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Append the mean over the regions, the last axis, if there are several and it is not there already."""
    if len(regions) == 1 or AVERAGE in regions:
        return values, regions
    return np.concatenate([values, mean(values, axis=-1)[..., None]], axis=-1), (*regions, AVERAGE)


def _unsigned(values: np.ndarray, metric: str) -> np.ndarray:
    """Absolute values for a metric whose sign says nothing about better or worse."""
    return np.abs(values) if metric_named(metric).better == 0 else values


def _badness(values: np.ndarray, metric: str) -> np.ndarray:
    """Values turned so that lower is better."""
    return -values if metric_named(metric).better > 0 else _unsigned(values, metric)
