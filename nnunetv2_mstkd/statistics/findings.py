"""Everything that is computed from the table of results of one model.

Intervals are over resampled patients: pass a :class:`~nnunetv2_mstkd.statistics.bootstrap.Bootstrap` with ``patients``
if a patient has several cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODALITIES,
    MODEL,
    REGION,
    SEPARATOR,
    SUBSET,
    TRAINER,
    VALUE,
    modality_order,
    patients_of,
    subset_order,
)
from nnunetv2_mstkd.metrics.conventions import DICE, postprocessed_regions
from nnunetv2_mstkd.statistics.bootstrap import (
    AVERAGE,
    DEFAULT,
    Bootstrap,
    cube,
    long_table,
    mean,
    with_average,
)
from nnunetv2_mstkd.statistics.plausibility import plausibility_warnings
from nnunetv2_mstkd.statistics.shapley import MAX_MODALITIES, MODALITY, shapley

FEW = 5
"""Below so many patients a bootstrap interval is much narrower than its level promises."""


class Findings:
    """The findings of an evaluation, as pandas data frames. Intervals are 95 %, over patients.

    Parameters
    ----------
    results
        The long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    empty_dice
        See :func:`~nnunetv2_mstkd.statistics.shapley.shapley`.
    channels
        The modalities of the model, if known: a note says if only some of them were evaluated.

    Attributes
    ----------
    results:
        The long table.
    by_subset:
        The mean over the cases, with the columns subset, modalities, region, metric, value. Here and below, a case that
        several folds predicted counts once, with the mean of its folds.
    summary, by_count:
        Mean Dice over all subsets with the worst subset, and by number of modalities: :func:`summary` and
        :func:`mean_by_count`.
    gap, shapley:
        Loss of Dice against the full input (:func:`gap_to_full`), and Shapley values of the modalities; None if the
        subsets that they need were not evaluated. Both are from the cases that have the full input.
    missing_one:
        The rows of ``gap`` for the subsets that lack one modality, with the column ``modality``, the costliest first;
        None without any.
    headline:
        In one sentence what each missing modality costs; None without ``missing_one``.
    warnings, notes:
        Results that contradict what the modalities show, and what cases that lack modalities mean for the numbers.
    model, trainer, folds, cases, subsets, num_patients:
        What was evaluated. A patient may have several cases.
    counts, full_cases:
        The number of cases by subset, and the cases that have the full input.
    complete:
        Whether every case has every subset.
    """

    def __init__(
        self,
        results: pd.DataFrame,
        empty_dice: Mapping[tuple[str, str], float] | None = None,
        channels: Sequence[str] = (),
    ) -> None:
        self.results = results
        self.model, self.trainer = str(results[MODEL].iloc[0]), str(results[TRAINER].iloc[0])
        self.folds, self.cases = sorted(results[FOLD].unique()), list(results[CASE].unique())
        modalities = modality_order(results[SUBSET])
        self.subsets = list(subset_order(results[SUBSET], modalities))
        of_subset = results.groupby(SUBSET)[CASE].unique()
        self.counts = {subset: len(of_subset[subset]) for subset in self.subsets}
        self.complete = set(self.counts.values()) == {len(self.cases)}
        self._patients = patients_of(results)
        self.num_patients = len(set(self._patients.values()))
        bootstrap = Bootstrap(self._patients)
        keys = [SUBSET, MODALITIES, REGION, METRIC]
        # a case that several folds predicted counts once, with their mean
        of_cases = results.groupby([*keys, CASE], sort=False)[VALUE].mean()
        self.by_subset = of_cases.groupby(keys, sort=False).mean().reset_index()
        self.summary = summary(results, bootstrap=bootstrap)
        self.by_count = mean_by_count(results, bootstrap=bootstrap)
        self.full_cases = list(of_subset.get(SEPARATOR.join(modalities), ()))
        self.gap = gap_to_full(results, bootstrap=bootstrap) if self.full_cases and len(self.subsets) > 1 else None
        self.missing_one = None if self.gap is None else missing_one(self.gap, modalities)
        self.headline = None if self.missing_one is None else headline(self.missing_one)
        if self.headline is not None and not self.complete:
            self.headline += f", from the {len(self.full_cases)} of {len(self.cases)} cases that have all modalities"
        every = len(self.subsets) == 2 ** len(modalities) - 1 and 1 < len(modalities) <= MAX_MODALITIES
        self.shapley = shapley(results, empty_dice, bootstrap=bootstrap) if every else None
        self.warnings = plausibility_warnings(results, bootstrap=bootstrap)
        self.notes = [] if self.complete else self._notes_on_counts(modalities)
        if self.gap is not None and len(modalities) < len(channels):
            self.notes.append(
                f"only these of the modalities {', '.join(channels)} were evaluated: {', '.join(modalities)}; complete "
                f"or full input means all of these"
            )
        for number in sorted({self.num_patients, self.full_patients}):
            if 1 < number < FEW:
                self.notes.append(f"intervals over {number} patients are too narrow to rely on")

    @property
    def full_patients(self) -> int:
        """Number of patients with the full input."""
        return len({self._patients[case] for case in self.full_cases})

    def _notes_on_counts(self, modalities: tuple[str, ...]) -> list[str]:
        numbers = self.counts.values()
        notes = [
            f"subsets were evaluated on {min(numbers)} to {max(numbers)} of {len(self.cases)} cases, those that have "
            f"their modalities: means of different subsets, and averages over subsets, are of different patients"
        ]
        if self.gap is None:
            notes.append(
                "no losses against the full input: no case has all modalities, or only the full input was used"
            )
        if self.shapley is None:
            notes.append(f"no Shapley values: no case was evaluated with all subsets of {', '.join(modalities)}")
        return notes


def missing_one(gap: pd.DataFrame, modalities: Sequence[str]) -> pd.DataFrame | None:
    """What a missing modality costs: the rows of :func:`gap_to_full` for subsets that lack just one.

    Returns
    -------
    The rows with a further column ``modality``, sorted by the largest loss of a region; None without any. The average
    over regions and postprocessed regions are left out.
    """
    lacking = {SEPARATOR.join(name for name in modalities if name != missing): missing for missing in modalities}
    plain = ~gap[REGION].isin({AVERAGE, *postprocessed_regions(gap[REGION].unique())})
    table = gap[gap[SUBSET].isin(lacking) & plain]
    if not len(table):
        return None
    table = table.assign(**{MODALITY: table[SUBSET].map(lacking)})
    found = set(table[MODALITY])
    most = table.groupby(MODALITY)[VALUE].max().round(9)[[name for name in modalities if name in found]]
    order = most.sort_values(ascending=False, kind="stable").index
    return table.set_index(MODALITY).loc[order].reset_index()


def headline(missing: pd.DataFrame) -> str | None:
    """In a sentence what each missing modality costs the region that loses most; ``missing`` is from missing_one.

    None where no region has a value.
    """
    known = missing.dropna(subset=[VALUE])
    worst = known.loc[known.groupby(MODALITY, sort=False)[VALUE].idxmax()].to_dict("records")
    parts = [f"without {row[MODALITY]}: {row[REGION]} {0.0 - round(100 * row[VALUE], 1):+.1f}" for row in worst]
    if not parts:
        return None
    parts[0] = f"{parts[0].capitalize()[0]}{parts[0][1:]} Dice points"
    return f"{'; '.join(parts)} (for each modality, the region that loses most)"


def summary(results: pd.DataFrame, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Mean Dice over all subsets with its interval, and the worst subset.

    Where cases lack subsets, the mean is that of the subsets' means. The ``average`` is that of the regions' means, as
    in nnU-Net, so that a region that some cases lack counts as much as the others.

    Returns
    -------
    Table with the columns model, region (each one and their ``average``), value, low, high, worst_subset, worst.
    """
    data = cube(results, DICE)

    def over(values: np.ndarray) -> np.ndarray:
        return with_average(mean(values, axis=-2), data.regions)[0]

    value, low, high = bootstrap.subset_estimates(data, data.values, over)
    by_subset, regions = with_average(mean(data.values, axis=1), data.regions)
    # NaN is never the worst; if there is nothing else, the first subset is
    places = np.nan_to_num(by_subset, nan=np.inf).argmin(axis=1)
    worst = np.take_along_axis(by_subset, places[:, None], axis=1)
    names = np.array(data.subsets)[places]
    axes = {MODEL: data.models, REGION: regions}
    return long_table(axes, value=value, low=low, high=high, worst_subset=names, worst=worst)


def mean_by_count(results: pd.DataFrame, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Mean Dice by number of available modalities, over all subsets of that size.

    Where cases lack subsets, the mean is that of the subsets' means; the ``average`` is as in :func:`summary`.

    Returns
    -------
    Table with the columns model, region (each one and their ``average``), modalities, value, low, high.
    """
    data = cube(results, DICE)

    def over(values: np.ndarray) -> np.ndarray:
        return with_average(data.by_size(values)[1], data.regions)[0].swapaxes(-1, -2)

    value, low, high = bootstrap.subset_estimates(data, data.values, over)
    _, regions = with_average(data.values, data.regions)
    axes = {MODEL: data.models, REGION: regions, MODALITIES: np.unique(data.sizes)}
    return long_table(axes, value=value, low=low, high=high)


def gap_to_full(results: pd.DataFrame, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """The loss of Dice of each subset against the full input, case by case, of the cases that have the full input.

    Returns
    -------
    Table with the columns model, region (each one and their ``average``), subset, modalities, value, low, high. A
    positive value is a loss.
    """
    data = cube(results, DICE)
    # the full input is the last subset
    gaps, regions = with_average(data.values[:, :, [data.full]] - data.values[:, :, : data.full], data.regions)
    value, low, high = bootstrap.estimates(gaps.swapaxes(2, 3), data.cases)
    axes = {MODEL: data.models, REGION: regions, SUBSET: data.subsets[: data.full]}
    return long_table(axes, value=value, low=low, high=high)
