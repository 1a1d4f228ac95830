"""What an evaluation's Dice becomes if only the largest component of the foreground is kept."""

from __future__ import annotations

import math

import pandas as pd

from nnunetv2_mstkd.evaluation.results import CASE, FOLD, METRIC, MODEL, REGION, SUBSET, VALUE, patients_of
from nnunetv2_mstkd.metrics.conventions import DICE
from nnunetv2_mstkd.statistics.bootstrap import HIGH, LOW, Bootstrap
from nnunetv2_mstkd.statistics.significance import DIFFERENCE, compare, paired_differences


class LargestComponent:
    """The change of a model's Dice, as a fraction, if only the largest component of the foreground is kept.

    Parameters
    ----------
    results
        The long table of the model; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    largest
        The Dice of the same cases with the largest component alone, as such a table.

    Attributes
    ----------
    by_subset
        Subset -> region -> mean Dice of the largest component over the cases; NaN if none has a value.
    difference, low, high
        The mean of each case over its subsets and the regions, compared with that of ``results``; the limits of the
        95 % interval over patients are NaN if there is one patient.
    cases, better, worse
        How many cases have a value, and of how many it rises and falls.
    undefined
        How many values have become NaN: where nothing is segmented any more of a region that the reference lacks, some
        rules for empty masks leave the Dice out, which was 0. The difference is without them.
    """

    def __init__(self, results: pd.DataFrame, largest: pd.DataFrame) -> None:
        plain = results[results[REGION].isin(largest[REGION].unique())]
        both = pd.concat([plain.assign(**{MODEL: "all"}), largest.assign(**{MODEL: "largest"})], ignore_index=True)
        models = ["largest", "all"]
        average = compare(both, models=models, bootstrap=Bootstrap(patients_of(results))).iloc[-1]
        self.difference, self.low, self.high = (float(average[name]) for name in (DIFFERENCE, LOW, HIGH))
        of_cases = paired_differences(both, models=models)
        changes = of_cases[of_cases[REGION] == average[REGION]][DIFFERENCE].dropna().round(9)
        self.cases, self.better, self.worse = len(changes), int((changes > 0).sum()), int((changes < 0).sum())
        each = largest.groupby([SUBSET, REGION, CASE], sort=False)[VALUE].mean()  # of the folds that predicted it
        keys = [FOLD, CASE, SUBSET, REGION]
        dice = plain[plain[METRIC] == DICE].merge(largest, on=keys, suffixes=("", "_after"))
        self.undefined = int((dice[VALUE].notna() & dice[f"{VALUE}_after"].isna()).sum())
        self.by_subset: dict[str, dict[str, float]] = {}
        for (subset, region), value in each.groupby([SUBSET, REGION], sort=False).mean().items():
            self.by_subset.setdefault(subset, {})[region] = float(value)

    @property
    def sentence(self) -> str | None:
        """The change in words; None if there is none."""
        if not self.better + self.worse + self.undefined:
            return None
        interval = "" if math.isnan(self.low) else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        undefined = f"; without {self.undefined} values that are no longer defined" if self.undefined else ""
        return (
            f"keeping only the largest component of the foreground (mstkd predict --largest-component) changes the "
            f"mean Dice by {100 * self.difference:+.1f} points{interval}: better in {self.better} of {self.cases} "
            f"cases, worse in {self.worse}{undefined}; it deletes all but one lesion"
        )
