"""From the long table of results to arrays, and the bootstrap over patients that all intervals come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import (
    CASE,
    METRIC,
    MODEL,
    REGION,
    SEPARATOR,
    SUBSET,
    VALUE,
    check_results,
    modality_order,
    subset_order,
)
from nnunetv2_mstkd.metrics.conventions import metric_named

SAMPLES = 10_000
"""Enough for the tails that 45 corrected intervals ask for (15 subsets, 3 regions)."""

AVERAGE = "average"
"""Stands in the column ``region`` for the mean over the regions."""

_CHUNK = 500


@dataclass(frozen=True)
class Cube:
    """The values of one metric.

    Attributes
    ----------
    values:
        shape (models, cases, subsets, regions); NaN where a case has no value.
    models, cases, subsets, regions, modalities:
        what stands along the axes, and the modalities in channel order.
    """

    values: np.ndarray
    models: tuple[str, ...]
    cases: tuple[str, ...]
    subsets: tuple[str, ...]
    regions: tuple[str, ...]
    modalities: tuple[str, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Number of modalities of each subset, shape (subsets,)."""
        return np.array([subset.count(SEPARATOR) + 1 for subset in self.subsets])

    @property
    def full(self) -> int:
        """Position of the subset with all modalities; ValueError where it was not evaluated."""
        if self.sizes[-1] < len(self.modalities):
            raise InputError(
                f"the results have no values of the full input {SEPARATOR.join(self.modalities)}; evaluate it too"
            )
        return len(self.subsets) - 1


def cube(
    results: pd.DataFrame, metric: str, *, models: Sequence[str] | None = None, regions: Sequence[str] | None = None
) -> Cube:
    """Arrange the values of a metric; a case that several folds predicted gets their mean.

    Parameters
    ----------
    results:
        see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    metric:
        its name.
    models, regions:
        which, and in which order; default all, as they come.

    Raises
    ------
    ValueError
        where the metric, a model or a region has no values, or a model lacks a case, subset or region that others have.
    """
    metric_named(metric)
    if METRIC not in results.columns:
        check_results(results)
    table = results[results[METRIC] == metric]
    if len(table) == 0:
        found = ", ".join(map(str, results[METRIC].unique())) or "none"
        raise InputError(f"the results have no values of {metric}; they have {found}")
    table = check_results(table)
    models = _chosen(table, MODEL, models)
    regions = _chosen(table, REGION, regions)
    table = table[table[MODEL].isin(models) & table[REGION].isin(regions)]
    modalities = modality_order(table[SUBSET])
    subsets = subset_order(table[SUBSET], modalities)
    cases = sorted(table[CASE].unique())

    keys = [MODEL, CASE, SUBSET, REGION]
    groups = table.groupby(keys, sort=False)[VALUE]
    index = pd.MultiIndex.from_product([models, cases, subsets, regions], names=keys)
    missing = index.difference(groups.size().index, sort=False)
    if len(missing):
        model, case, subset, region = missing[0]
        more = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"the results have no {metric} of model {model}, case {case}, subset {subset}, region {region}{more}; "
            f"models are compared on the same cases, subsets and regions"
        )
    shape = len(models), len(cases), len(subsets), len(regions)
    values = groups.mean().reindex(index).to_numpy(dtype=float).reshape(shape)
    return Cube(values, tuple(models), tuple(cases), subsets, tuple(regions), modalities)


def _chosen(table: pd.DataFrame, column: str, wanted: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(table[column]))
    if wanted is None:
        return known
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        problem = f"no {column} {', '.join(unknown)}" if unknown else f"no use for the list of {column}s {list(wanted)}"
        raise InputError(f"the results have {problem}; they have {', '.join(known)}")
    return list(wanted)


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean without the NaN; NaN, and no warning, where there is nothing else."""
    valid = ~np.isnan(values)
    count = valid.sum(axis=axis)
    total = np.where(valid, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def patient_numbers(cases: Sequence[str], patients: Mapping[str, str] | None) -> np.ndarray:
    """The patient of each case as a number 0, 1 ...

    Parameters
    ----------
    cases:
        identifiers.
    patients:
        patient by case; None: every case is a patient of its own. See
        :func:`~nnunetv2_mstkd.evaluation.results.patients_of`.

    Raises
    ------
    ValueError
        where a case has no patient.
    """
    if patients is None:
        return np.arange(len(cases))
    missing = [case for case in cases if case not in patients]
    if missing:
        raise InputError(f"no patient is given for case {missing[0]}{' and others' if len(missing) > 1 else ''}")
    return np.unique([patients[case] for case in cases], return_inverse=True)[1].ravel()


def bootstrap_means(values: np.ndarray, patients: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means over resampled patients, each of which brings all its cases (Field and Welsh 2007, cluster bootstrap).

    Parameters
    ----------
    values:
        shape (cases, K); NaN are left out.
    patients:
        shape (cases,), from :func:`patient_numbers`.
    samples:
        number of resamples, at least 1.

    Returns
    -------
    Array of shape (samples, K). The same ``seed`` draws the same patients, whatever the values.
    """
    if samples < 1:
        raise InputError(f"{samples} resamples; expected at least 1")
    number = int(patients.max()) + 1
    generator = np.random.default_rng(seed)
    valid = ~np.isnan(values)
    filled = np.where(valid, values, 0.0)
    means = []
    for begin in range(0, samples, _CHUNK):
        drawn = generator.multinomial(number, np.full(number, 1 / number), size=min(_CHUNK, samples - begin))
        weights = drawn[:, patients].astype(float)
        count = weights @ valid
        means.append(np.divide(weights @ filled, count, out=np.full(count.shape, np.nan), where=count > 0))
    return np.concatenate(means)


def interval(resampled: np.ndarray, patients: np.ndarray, level: float | np.ndarray = 0.95) -> np.ndarray:
    """Percentile interval of resampled numbers.

    Parameters
    ----------
    resampled:
        shape (samples, K).
    patients:
        what the samples were drawn from; a single patient says nothing about others, so the interval is NaN.
    level:
        coverage, one for all or one for each, shape (K,).

    Returns
    -------
    Array of shape (2, K): lower and upper limits.
    """
    levels = np.broadcast_to(np.asarray(level, dtype=float), resampled.shape[1:])
    if np.any((levels <= 0) | (levels >= 1)):
        raise InputError(f"the level {level} of an interval does not lie between 0 and 1")
    limits = np.full((2, *resampled.shape[1:]), np.nan)
    if patients.max() > 0:
        for column, coverage in enumerate(levels):
            present = resampled[:, column][~np.isnan(resampled[:, column])]
            if len(present):
                limits[:, column] = np.quantile(present, [(1 - coverage) / 2, (1 + coverage) / 2])
    return limits
