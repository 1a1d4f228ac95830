"""Everything that is computed from the table of results of one model."""

from __future__ import annotations

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
from nnunetv2_mstkd.statistics.bootstrap import Bootstrap
from nnunetv2_mstkd.statistics.plausibility import plausibility_warnings
from nnunetv2_mstkd.statistics.shapley import MAX_MODALITIES, shapley
from nnunetv2_mstkd.statistics.tests import gap_to_full, mean_by_count, summary


class Findings:
    """The findings of an evaluation, as pandas data frames. Intervals are 95 %, over patients.

    Attributes
    ----------
    results:
        The long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    by_subset:
        The mean over the cases, with the columns subset, modalities, region, metric, value.
    summary, by_count:
        Mean Dice over all subsets with the worst subset, and by number of modalities; see
        :mod:`~nnunetv2_mstkd.statistics.tests`.
    gap, shapley:
        Loss of Dice against the full input, and Shapley values of the modalities; None if the subsets that they need
        were not evaluated.
    warnings:
        Results that contradict what the modalities show.
    model, trainer, folds, cases, subsets:
        What was evaluated.
    num_patients:
        Number of patients, who may have several cases each.
    """

    def __init__(self, results: pd.DataFrame) -> None:
        self.results = results
        self.model, self.trainer = str(results[MODEL].iloc[0]), str(results[TRAINER].iloc[0])
        self.folds, self.cases = sorted(results[FOLD].unique()), list(results[CASE].unique())
        modalities = modality_order(results[SUBSET])
        self.subsets = list(subset_order(results[SUBSET], modalities))
        patients = patients_of(self.cases)
        self.num_patients = len(set(patients.values()))
        bootstrap = Bootstrap(patients)
        keys = [SUBSET, MODALITIES, REGION, METRIC]
        self.by_subset = results.groupby(keys, sort=False)[VALUE].mean().reset_index()
        self.summary = summary(results, bootstrap=bootstrap)
        self.by_count = mean_by_count(results, bootstrap=bootstrap)
        full = SEPARATOR.join(modalities) in self.subsets and len(self.subsets) > 1
        self.gap = gap_to_full(results, bootstrap=bootstrap) if full else None
        complete = len(self.subsets) == 2 ** len(modalities) - 1 and 1 < len(modalities) <= MAX_MODALITIES
        self.shapley = shapley(results, bootstrap=bootstrap) if complete else None
        self.warnings = plausibility_warnings(results, bootstrap=bootstrap)
