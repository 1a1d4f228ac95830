"""Paired comparisons of models over all subsets of modalities: intervals, Wilcoxon tests, Holm's correction, ranks.

All functions take the long table of :mod:`~nnunetv2_mstkd.evaluation.results`, the models to use (default all) and the
baseline that all others are compared with (default: all pairs are compared), and return a table. A difference is model
- against; a value that one of the two lacks (NaN) is left out of both. A case that lacks modalities counts with the
subsets that it has. Volume errors are compared by absolute value.

With several training runs of each model (column ``training``), a difference is between the means over runs, and its
interval includes the variation between them (:mod:`~nnunetv2_mstkd.statistics.trainings`). Equal numbers of runs are
paired in order of appearance, and the column by_training has the difference of each pair; otherwise they count as
independent samples. There is then no test (p is NaN) and no correction for the number of intervals: a p-value over
cases is one about these networks, and a few runs carry none. With one training run of each, intervals and tests are
about the trained networks, not about the methods.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    plain_regions,
    unsigned,
    with_average,
)
from nnunetv2_mstkd.statistics.trainings import widen

DIFFERENCE = "difference"
AGAINST = "against"
P = "p"
P_CORRECTED = "p_corrected"
BY_TRAINING = "by_training"
PATIENTS = "patients"


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
    p_corrected, cases, patients, and by_training where trainings are paired.
    """
    data, pairs = _paired(results, metric, models, baseline)

    def per_case(values: np.ndarray) -> np.ndarray:
        return mean(with_average(values, data.regions)[0], axis=-2)

    found = _tested(pairs, per_case, data.cases, bootstrap, within_pairs=False)
    used, groups = ~np.isnan([per_case(pair.differences) for pair in pairs]), bootstrap.groups(data.cases)
    found["cases"] = used.sum(axis=1)
    found[PATIENTS] = np.apply_along_axis(lambda of_case: len(np.unique(groups[of_case])), 1, used)
    return _table_of_pairs(pairs, {REGION: with_average(pairs[0].differences, data.regions)[1]}, found)


def paired_differences(
    results: pd.DataFrame, *, metric: str = "dice", models: Sequence[str] | None = None, baseline: str | None = None
) -> pd.DataFrame:
    """The differences behind :func:`compare`, case by case.

    Returns
    -------
    Table with the columns model, against, case, region (each one and their ``average``), difference.
    """
    data, pairs = _paired(results, metric, models, baseline)
    differences, regions = with_average(np.stack([pair.differences for pair in pairs]), data.regions)
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
    1 - (1 - level) / (m - k + 1) at which Holm's step-down procedure examines it. It does
    not follow that all intervals hold together with probability ``level``.

    Returns
    -------
    Table with the columns model, against, subset, modalities, region, difference, low, high, level, p, p_corrected.
    """
    data, pairs = _paired(results, metric, models, baseline)
    tested = _tested(pairs, lambda values: values, data.cases, bootstrap)
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
    data, pairs = _paired(results, metric, models, baseline)

    def per_case(values: np.ndarray) -> np.ndarray:
        return data.by_size(with_average(values, data.regions)[0])[1]

    tested = _tested(pairs, per_case, data.cases, bootstrap)
    regions = with_average(pairs[0].differences, data.regions)[1]
    axes: dict[str, Iterable] = {MODALITIES: np.unique(data.sizes), REGION: regions}
    return _table_of_pairs(pairs, axes, tested)


def rank_table(
    results: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("dice",),
    models: Sequence[str] | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> pd.DataFrame:
    """Rank models as BraTS does, with the stability of the ranking.

    Models are ranked within each case, subset, region (postprocessed ones excepted) and metric, ties sharing their mean
    rank; the mean of these ranks decides. Stability as in Wiesenfarth et al., Sci. Rep. 11:2369 (2021): the ranking is
    repeated on resampled patients. Of several training runs, those of the same number are ranked together, and runs are
    resampled too, which shows less than their true variation if they are few.

    Returns
    -------
    Table, best model first, with the columns model, rank, mean_rank, low, high (interval of the rank), first (fraction
    of resamples in which the model, alone or tied, is best).

    Raises
    ------
    InputError
        With fewer than two models or different numbers of trainings, for NaN values, which have no rank (use the
        convention "brats"), and if metrics were evaluated on different cases.
    """
    ranks: list[np.ndarray] = []
    names: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    for metric in metrics:
        data = cube(results, metric, models=models)
        if len({len(each) for each in data.trainings}) > 1:
            raise InputError("a ranking needs the same number of training runs of each model")
        # (models, trainings, cases, subsets, regions)
        values = np.stack(data.trainings)[..., plain_regions(data.regions)]
        if np.isnan(values[:, :, data.evaluated]).any():
            raise InputError(
                f"the results have {metric} values that are left out (nan), and these have no rank; evaluate with the "
                f"convention brats"
            )
        if names and (names, cases) != (data.models, data.cases):
            raise InputError(f"{metrics[0]} and {metric} were not evaluated for the same models and cases")
        names, cases = data.models, data.cases
        # (models, trainings, cases): the mean rank among models over subsets and regions; NaN, no subset, has no rank
        ranks.append(mean(stats.rankdata(badness(values, metric), axis=0), axis=(3, 4)))
    if len(names) < 2:
        raise InputError(f"a ranking needs at least two models, found {', '.join(names) or 'no metric'}")
    per_case = np.mean(ranks, axis=0)
    groups = bootstrap.groups(cases)
    means = per_case.mean(axis=(1, 2))
    drawn = bootstrap.means(np.moveaxis(per_case, 2, 0), groups)  # (samples, models, trainings)
    number = drawn.shape[2]
    weights = np.random.default_rng(bootstrap.seed).multinomial(number, np.full(number, 1 / number), len(drawn))
    drawn = (drawn * weights[:, None] / number).sum(axis=2)
    # rounded: means of the same ranks in another order must tie
    resampled = stats.rankdata(drawn.round(9), axis=1, method="min").astype(float)
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
    # before scipy, which chooses between exact test and approximation by their number with the zeros
    means = means[means != 0]
    return float(stats.wilcoxon(means).pvalue) if len(means) else 1.0


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


# ---- pairs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Two models of a comparison."""

    model: str
    against: str
    differences: np.ndarray
    """Means over the trainings, shape (cases, subsets, regions)."""
    samples: tuple[np.ndarray, ...]
    """Independent samples of trainings, each of shape (trainings, cases, subsets, regions): the differences of paired
    ones, or one sample per model; none with one training of each."""

    @property
    def paired(self) -> bool:
        return len(self.samples) == 1


def _paired(
    results: pd.DataFrame, metric: str, models: Sequence[str] | None, baseline: str | None
) -> tuple[Cube, list[_Pair]]:
    """The values, and the pairs of models to compare."""
    data = cube(results, metric, models=models)
    if len(data.models) < 2:
        raise InputError(f"a comparison needs at least two models, found {', '.join(data.models)}")
    if baseline is None:
        pairs = list(itertools.combinations(data.models, 2))
    elif baseline in data.models:
        pairs = [(name, baseline) for name in data.models if name != baseline]
    else:
        raise InputError(f"the results have no model {baseline}; they have {', '.join(data.models)}")
    numbers = {model: len(each) for model, each in zip(data.models, data.trainings, strict=True)}
    if min(numbers.values()) == 1 < max(numbers.values()):
        raise InputError(
            f"several training runs are compared with one ({', '.join(f'{m} {n}' for m, n in numbers.items())}); one "
            f"does not show the variation between runs, so give two or more of each model, or one of each"
        )
    trainings = {model: unsigned(each, metric) for model, each in zip(data.models, data.trainings, strict=True)}
    return data, [_pair(model, against, trainings[model], trainings[against]) for model, against in pairs]


def _pair(model: str, against: str, first: np.ndarray, second: np.ndarray) -> _Pair:
    if len(first) == len(second):
        paired = first - second
        return _Pair(model, against, mean(paired, axis=0), (paired,) if len(paired) > 1 else ())
    differences = mean(first, axis=0) - mean(second, axis=0)
    # the same values of both
    samples = tuple(np.where(np.isnan(differences), np.nan, each) for each in (first, second))
    return _Pair(model, against, differences, samples)


def _tested(
    pairs: Sequence[_Pair],
    over: Callable[[np.ndarray], np.ndarray],
    cases: Sequence[str],
    bootstrap: Bootstrap,
    *,
    within_pairs: bool = True,
) -> dict[str, np.ndarray]:
    """Mean, interval and test of each pair of models, by column, each of shape (pairs, K...).

    ``over`` takes differences of shape (..., cases, subsets, regions) to those that are tested, (..., cases, K...).
    Holm's correction is ``within_pairs``, with matching levels of the intervals, or over all p-values.
    """
    differences, groups = np.stack([over(pair.differences) for pair in pairs]), bootstrap.groups(cases)
    p_values = np.apply_along_axis(wilcoxon, 1, differences, groups)
    p_values[[bool(pair.samples) for pair in pairs]] = np.nan
    columns = {P: p_values, P_CORRECTED: holm(p_values)[0]}
    levels = np.full(p_values.shape, bootstrap.level)
    if within_pairs:
        corrected, levels = (
            np.stack(part) for part in zip(*(holm(of_pair, bootstrap.level) for of_pair in p_values), strict=True)
        )
        columns = {"level": levels, P: p_values, P_CORRECTED: corrected}
    estimates = []
    # pair by pair: the resamples of all of them could fill memory
    for pair, of_pair, level in zip(pairs, differences, levels, strict=True):
        value, low, high = (part[0] for part in bootstrap.estimates(of_pair[None], cases, level[None]))
        samples = [mean(over(each), axis=1) for each in pair.samples]
        estimates.append((value, *widen(value, low, high, samples, bootstrap.level)))
    value, low, high = (np.stack(part) for part in zip(*estimates, strict=True))
    columns = {DIFFERENCE: value, LOW: low, HIGH: high, **columns}
    if any(pair.paired for pair in pairs):
        by_training = np.empty(value.shape, dtype=object)
        for place, pair in enumerate(pairs):
            if pair.paired:
                means = mean(over(pair.samples[0]), axis=1)
                for number in np.ndindex(value.shape[1:]):
                    by_training[place][number] = [float(each[number]) for each in means]
        columns[BY_TRAINING] = by_training
    return columns


def _table_of_pairs(
    pairs: Sequence[_Pair], axes: Mapping[str, Iterable], columns: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """A row per pair of models and element along ``axes``."""
    table = long_table({"pair": range(len(pairs)), **axes}, **columns)
    numbers = table.pop("pair")
    table.insert(0, MODEL, [pairs[number].model for number in numbers])
    table.insert(1, AGAINST, [pairs[number].against for number in numbers])
    return table
