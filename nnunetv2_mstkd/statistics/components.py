"""What an evaluation's Dice becomes if only the largest component of the foreground is kept."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.results import MODEL, REGION, patients_of
from nnunetv2_mstkd.metrics.conventions import DICE
from nnunetv2_mstkd.statistics.bootstrap import Bootstrap, cube, mean, with_average


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
        data = cube(both, DICE, models=["all", "largest"])
        before, after = data.values
        # over subsets, then the average over regions, which is the last one, or the only region
        changes = mean(with_average(after - before, data.regions)[0], axis=-2)[:, -1:]
        estimates = Bootstrap(patients_of(results)).estimates(changes[None], data.cases)
        self.difference, self.low, self.high = (float(each[0, 0]) for each in estimates)
        rounded = changes[~np.isnan(changes)].round(9)
        self.cases, self.better, self.worse = len(rounded), int((rounded > 0).sum()), int((rounded < 0).sum())
        self.undefined = int((np.isnan(after) & ~np.isnan(before)).sum())
        means = mean(after, axis=0)
        self.by_subset = {
            subset: dict(zip(data.regions, of_subset.tolist(), strict=True))
            for subset, of_subset in zip(data.subsets, means, strict=True)
        }

    @property
    def sentence(self) -> str | None:
        """The change as a sentence; None if nothing changes."""
        if not self.better + self.worse + self.undefined:
            return None
        interval = "" if math.isnan(self.low) else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        undefined = f"; without {self.undefined} values that are no longer defined" if self.undefined else ""
        return (
            f"keeping only the largest component of the foreground (mstkd predict --largest-component) changes the "
            f"mean Dice by {100 * self.difference:+.1f} points{interval}: better in {self.better} of {self.cases} "
            f"cases, worse in {self.worse}{undefined}; it deletes all but one lesion"
        )
