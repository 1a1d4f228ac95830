"""What the results of one model say, and the tables in which people read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
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
from nnunetv2_mstkd.statistics.plausibility import plausibility_warnings
from nnunetv2_mstkd.statistics.shapley import MAX_PLAYERS, shapley
from nnunetv2_mstkd.statistics.tests import HIGH, LOW, gap_to_full, mean_by_count, summary


class Findings:
    """Everything that is computed from the table of results of one model; intervals are 95 %, over patients.

    Attributes
    ----------
    model, trainer, folds, cases:
        which model, and which cases it was evaluated on.
    subsets:
        that were evaluated, in the order of tables.
    summary, by_count:
        of the Dice; see :mod:`~nnunetv2_mstkd.statistics.tests`.
    gap, shapley:
        of the Dice; None where the subsets that they need were not evaluated.
    warnings:
        results that contradict what the modalities show.
    """

    def __init__(self, results: pd.DataFrame) -> None:
        self.results = results
        self.model, self.trainer = str(results[MODEL].iloc[0]), str(results[TRAINER].iloc[0])
        self.folds, self.cases = sorted(results[FOLD].unique()), list(results[CASE].unique())
        self.subsets = list(subset_order(results[SUBSET], modality_order(results[SUBSET])))
        self.patients = patients_of(self.cases)
        modalities = modality_order(self.subsets)
        self.summary = summary(results, patients=self.patients)
        self.by_count = mean_by_count(results, patients=self.patients)
        full = SEPARATOR.join(modalities) in self.subsets
        self.gap = gap_to_full(results, patients=self.patients) if full and len(self.subsets) > 1 else None
        complete = len(self.subsets) == 2 ** len(modalities) - 1 and 1 < len(modalities) <= MAX_PLAYERS
        self.shapley = shapley(results, patients=self.patients) if complete else None
        self.warnings = plausibility_warnings(results)

    @property
    def num_patients(self) -> int:
        return len(set(self.patients.values()))


def overall_table(table: pd.DataFrame) -> pd.DataFrame:
    """:attr:`Findings.summary` as text: region, mean with its interval, worst subset."""
    rows = [
        (row[REGION], percent(row), f"{row['worst_subset']} ({points(row['worst'])})")
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=["region", "mean", "worst subset"])


def spread_table(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per value of ``column`` and a column per region, in percent with the interval, as text."""
    regions = list(dict.fromkeys(table[REGION]))
    cells = {(row[column], row[REGION]): percent(row) for row in table.to_dict("records")}
    rows = [(str(key), *(cells[key, region] for region in regions)) for key in dict.fromkeys(table[column])]
    return pd.DataFrame(rows, columns=[column, *regions])


def percent(row: Mapping[str, Any]) -> str:
    """A value with its interval, times 100."""
    limits = "" if not np.isfinite(row[LOW]) else f" [{points(row[LOW])}, {points(row[HIGH])}]"
    return f"{points(row[VALUE])}{limits}"


def points(value: float) -> str:
    """A share, times 100."""
    return "-" if not math.isfinite(value) else f"{round(100 * value, 1) + 0.0:.1f}"  # no -0.0
