"""From the long table of results to arrays, and the bootstrap over patients behind all intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import (
    AVERAGE,
    CASE,
    METRIC,
    MODALITIES,
    MODEL,
    REGION,
    SEPARATOR,
    SUBSET,
    TRAINING,
    VALUE,
    check_results,
    modality_order,
    subset_order,
    subset_size,
)
from nnunetv2_mstkd.metrics.conventions import metric_named, postprocessed_regions

SAMPLES = 10_000
"""Enough for the tails that 45 corrected intervals need (15 subsets, 3 regions)."""

LOW, HIGH = "low", "high"
"""Columns of the limits of an interval."""

_CHUNK = 500


# ---- arrays --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cube:
    """The values of one metric, shape (models, cases, subsets, regions), and the names along the axes.

    A value is NaN where a case has none. Modalities are in channel order, subsets by size.
    """

    values: np.ndarray
    """Means over the trainings of each model."""
    trainings: tuple[np.ndarray, ...]
    """The trainings of each model, shape (trainings, cases, subsets, regions)."""
    evaluated: np.ndarray
    """bool, shape (cases, subsets): False for a subset with modalities that the case lacks."""
    models: tuple[str, ...]
    cases: tuple[str, ...]
    subsets: tuple[str, ...]
    regions: tuple[str, ...]
    modalities: tuple[str, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Number of modalities of each subset, shape (subsets,)."""
        return np.array([subset_size(subset) for subset in self.subsets])

    @property
    def counts(self) -> np.ndarray:
        """Number of cases with each subset, shape (subsets,)."""
        return self.evaluated.sum(axis=0)

    @property
    def complete(self) -> bool:
        """Whether every case has every subset."""
        return bool(self.evaluated.all())

    def complete_cases(self) -> Cube:
        """Only the cases that have all subsets; there may be none."""
        chosen = np.flatnonzero(self.evaluated.all(axis=1))
        cases = tuple(self.cases[number] for number in chosen)
        trainings = tuple(each[:, chosen] for each in self.trainings)
        values, evaluated = self.values[:, chosen], self.evaluated[chosen]
        return replace(self, values=values, trainings=trainings, evaluated=evaluated, cases=cases)

    def by_size(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of modalities, and means of values of shape (..., subsets, regions) over the subsets of each size."""
        sizes = np.unique(self.sizes)
        return sizes, np.stack([mean(values[..., self.sizes == size, :], axis=-2) for size in sizes], axis=-2)

    @property
    def full(self) -> int:
        """Position of the subset with all modalities; InputError if it was not evaluated."""
        if self.sizes[-1] < len(self.modalities):
            raise InputError(
                f"the results have no values of the full input {SEPARATOR.join(self.modalities)}; evaluate it too"
            )
        return len(self.subsets) - 1


def cube(results: pd.DataFrame, metric: str, *, models: Sequence[str] | None = None) -> Cube:
    """Arrange the values of a metric; a case that several folds of a training predicted gets their mean.

    A case may lack modalities; then it has no values of the subsets with them.

    Parameters
    ----------
    results:
        The long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`, and ``TRAINING`` there.
    metric, models:
        What to use, models in this order; default all of them, in order of appearance.

    Raises
    ------
    InputError
        If the metric or a model has no values, a training lacks a case, subset or region that others have, or
        a case lacks a subset although it has the modalities.
    """
    metric_named(metric)
    if METRIC not in results.columns:
        check_results(results)
    table = results[results[METRIC] == metric]
    if len(table) == 0:
        found = ", ".join(map(str, results[METRIC].unique())) or "none"
        raise InputError(f"the results have no values of {metric}; they have {found}")
    table = check_results(table)
    models = _chosen_models(table, models)
    table = table[table[MODEL].isin(models)]
    regions = list(dict.fromkeys(table[REGION]))
    modalities = modality_order(table[SUBSET])
    subsets = subset_order(table[SUBSET], modalities)
    cases = sorted(table[CASE].unique())

    label = table[TRAINING].astype(str) if TRAINING in table else pd.Series("", index=table.index)
    of_model = [list(dict.fromkeys(label[table[MODEL] == model])) for model in models]
    runs = [(model, training) for model, found in zip(models, of_model, strict=True) for training in found]
    numbers = {run: number for number, run in enumerate(runs)}
    table = table.assign(**{TRAINING: [numbers[run] for run in zip(table[MODEL], label, strict=True)]})
    keys = [TRAINING, CASE, SUBSET, REGION]
    means = table.groupby(keys, sort=False)[VALUE].mean()
    index = pd.MultiIndex.from_product([range(len(runs)), cases, subsets, regions], names=keys)
    shape = len(runs), len(cases), len(subsets), len(regions)
    there = index.isin(means.index).reshape(shape)
    members = np.array([[name in subset.split(SEPARATOR) for name in modalities] for subset in subsets])
    has = there.any(axis=(0, 3)) @ members  # (cases, modalities)
    evaluated = ~np.any(members & ~has[:, None], axis=2)
    missing = index[(evaluated[None, :, :, None] & ~there).ravel()]
    if len(missing):
        run, case, subset, region = missing[0]
        more = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"the results have no {metric} of model {runs[run][0]}, case {case}, subset {subset}, region "
            f"{region}{more}; models are compared on the same cases, subsets and regions"
        )
    by_run = means.reindex(index).to_numpy(dtype=float).reshape(shape)
    ends = np.cumsum([len(found) for found in of_model])
    trainings = tuple(np.split(by_run, ends[:-1]))
    values = np.stack([mean(each, axis=0) for each in trainings])
    return Cube(values, trainings, evaluated, tuple(models), tuple(cases), subsets, tuple(regions), modalities)


def _chosen_models(table: pd.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(table[MODEL]))
    if wanted is None:
        return known
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        problem = f"no model {', '.join(unknown)}" if unknown else f"no use for the list of models {list(wanted)}"
        raise InputError(f"the results have {problem}; they have {', '.join(known)}")
    return list(wanted)


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean without NaN; NaN, without a warning, where there is nothing else."""
    valid = ~np.isnan(values)
    count = valid.sum(axis=axis)
    total = np.where(valid, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def unsigned(values: np.ndarray, metric: str) -> np.ndarray:
    """Absolute values for a metric whose sign says nothing about better or worse."""
    return np.abs(values) if metric_named(metric).better == 0 else values


def badness(values: np.ndarray, metric: str) -> np.ndarray:
    """Values turned so that lower is better."""
    return -values if metric_named(metric).better > 0 else unsigned(values, metric)


def with_average(values: np.ndarray, regions: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Append the mean over the regions, the last axis, if there are several and it is not there already.

    Postprocessed regions, ``ET (min 500)`` beside ``ET``, are not in the mean.
    """
    plain = plain_regions(regions)
    if len(plain) == 1 or AVERAGE in regions:
        return values, regions
    return np.concatenate([values, mean(values[..., plain], axis=-1)[..., None]], axis=-1), (*regions, AVERAGE)


def plain_regions(regions: Sequence[str]) -> list[int]:
    """Positions of the regions that are not postprocessed ones."""
    postprocessed = postprocessed_regions(regions)
    return [place for place, name in enumerate(regions) if name not in postprocessed]


def long_table(axes: Mapping[str, Iterable], **columns: np.ndarray) -> pd.DataFrame:
    """A table with a row per element of arrays: the labels along their axes, then the element of each array.

    The number of modalities is inserted behind each subset.
    """
    index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    table = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index).reset_index()
    if SUBSET in axes:
        table.insert(list(axes).index(SUBSET) + 1, MODALITIES, table[SUBSET].map(subset_size))
    return table


# ---- bootstrap -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bootstrap:
    """A bootstrap over patients, each of whom brings all their cases (Field and Welsh 2007, cluster bootstrap).

    ``patients`` are the patients by case (:func:`~nnunetv2_mstkd.evaluation.results.patients_of`); None: every case is
    a separate patient. The same seed draws the same patients, whatever the values; ``level`` is the coverage of the
    intervals.
    """

    patients: Mapping[str, str] | None = None
    samples: int = SAMPLES
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"{self.samples} resamples; expected at least 1")

    def groups(self, cases: Sequence[str]) -> np.ndarray:
        """The patient of each case as a number 0, 1 ...; InputError if a case has no patient."""
        if self.patients is None:
            return np.arange(len(cases))
        missing = [case for case in cases if case not in self.patients]
        if missing:
            raise InputError(f"no patient is given for case {missing[0]}{' and others' if len(missing) > 1 else ''}")
        return np.unique([self.patients[case] for case in cases], return_inverse=True)[1].ravel()

    def means(self, values: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Means over resampled patients, without NaN, shape (samples, ...), of values of shape (cases, ...)."""
        flat = values.reshape(len(values), -1)
        valid = ~np.isnan(flat)
        filled = np.where(valid, flat, 0.0)
        number = int(groups.max()) + 1
        generator = np.random.default_rng(self.seed)
        means = []
        for begin in range(0, self.samples, _CHUNK):
            size = min(_CHUNK, self.samples - begin)
            weights = generator.multinomial(number, np.full(number, 1 / number), size=size)[:, groups].astype(float)
            count = weights @ valid
            means.append(np.divide(weights @ filled, count, out=np.full(count.shape, np.nan), where=count > 0))
        return np.concatenate(means).reshape(self.samples, *values.shape[1:])

    def limits(
        self, resampled: np.ndarray, groups: np.ndarray, level: float | np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limits, each of shape (...), of the percentile intervals of resampled numbers.

        Parameters
        ----------
        resampled:
            Shape (samples, ...).
        groups:
            From :meth:`groups`; a single patient says nothing about others, so the limits are NaN.
        level:
            Coverage, one for all or of shape (...); default :attr:`level`.
        """
        shape = resampled.shape[1:]
        levels = np.broadcast_to(np.asarray(self.level if level is None else level, dtype=float), shape)
        if np.any((levels <= 0) | (levels >= 1)):
            raise InputError(f"the level {levels.ravel()[0]:g} of an interval does not lie between 0 and 1")
        limits = np.full((2, *shape), np.nan)
        if groups.max() > 0:
            for place in np.ndindex(shape):
                column = (slice(None), *place)
                present = resampled[column][~np.isnan(resampled[column])]
                if len(present):
                    tail = (1 - levels[place]) / 2
                    limits[column] = np.quantile(present, [tail, 1 - tail])
        return limits[0], limits[1]

    def estimates(
        self, values: np.ndarray, cases: Sequence[str], level: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over the cases with lower and upper limits, each of shape (N, ...), of values (N, cases, ...).

        ``level`` is the coverage of each interval, of shape (N, ...); default :attr:`level`. Where a single patient has
        values, the limits are NaN.
        """
        by_case, groups = np.moveaxis(values, 1, 0), self.groups(cases)
        low, high = self.limits(self.means(by_case, groups), groups, level)
        known = _of_several(by_case, groups)
        return mean(by_case, axis=0), np.where(known, low, np.nan), np.where(known, high, np.nan)

    def subset_estimates(
        self, data: Cube, values: np.ndarray, over: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over cases and subsets with lower and upper limits, each of shape (models, ...).

        Parameters
        ----------
        data:
            Where the values are from.
        values:
            Shape (models, cases, subsets, regions). The mean of each subset over the cases that have a value is taken
            first, so that all subsets count the same.
        over:
            Takes means over subsets: from shape (..., subsets, regions) to any shape (..., ...).
        """
        if not np.isnan(values).any():
            return self.estimates(over(values), data.cases)  # the same, in less time
        by_case, groups = np.moveaxis(values, 1, 0), self.groups(data.cases)
        value, drawn = mean(by_case, axis=0), self.means(by_case, groups)
        counted = ~np.isnan(value)

        def any_of(which: np.ndarray) -> np.ndarray:
            return over(which.astype(float)) > 0

        # a resample without any patient of a subset has a mean of other subsets, which is another quantity
        whole = np.where(any_of(np.isnan(drawn) & counted), np.nan, over(drawn))
        known = ~any_of(~_of_several(by_case, groups) & counted)
        low, high = self.limits(whole, groups)
        return over(value), np.where(known, low, np.nan), np.where(known, high, np.nan)


def _of_several(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether more than one patient has a value, shape (...), of values of shape (cases, ...)."""
    valid = ~np.isnan(values)
    patients = groups.reshape(-1, *[1] * (values.ndim - 1))
    return (valid & (patients != groups[valid.argmax(axis=0)])).any(axis=0)


DEFAULT = Bootstrap()
