"""Does distillation help? The numbers of a comparison against what was asked of them beforehand, line by line.

The unit is a training (seed) of a case: its mean over subsets and regions. Seeds are in the column ``training``, so
that intervals include their luck; three networks carry no p-value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODALITIES,
    MODEL,
    REGION,
    SUBSET,
    TRAINER,
    TRAINING,
    VALUE,
    patients_of,
)
from nnunetv2_mstkd.statistics.bootstrap import AVERAGE, HIGH, LOW, SAMPLES, Bootstrap
from nnunetv2_mstkd.statistics.significance import (
    BY_TRAINING,
    DIFFERENCE,
    compare,
    compare_subsets,
)

DICE = "dice"

GAIN = 1.5
"""Dice points by which the student's mean must beat the best control."""
WORSE = -0.5
"""A subset is worse where even the upper end of its interval lies below."""
FULL_LOSS = -0.3
"""Points that the student may lose against FullModalityTrainer with all modalities."""
SEEDS, TRAINING_CASES, TEST_CASES = 5, 60, 24
"""With three seeds an interval is 2.5 times their standard deviation to either side, too wide for :data:`GAIN`."""
CEILINGS = {"WT": 0.92, "ET": 0.88}
"""Data on which FullModalityTrainer with all modalities reaches this are too easy to show a difference."""
SHORT = {"whole tumor": "WT", "tumor core": "TC", "enhancing tumor": "ET"}


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Attributes
    ----------
    claim:
        what was asked.
    found:
        the number.
    met:
        None: cannot be said.
    """

    claim: str
    found: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "open"}[self.met]

    def __str__(self) -> str:
        return f"{self.word:7s} {self.claim}: {self.found}"


def regions_averaged(results: pd.DataFrame) -> pd.DataFrame:
    """Dice with the mean over the regions in place of the regions."""
    dice = results[results[METRIC] == DICE]
    keys = [MODEL, TRAINER, FOLD, TRAINING, CASE, SUBSET, MODALITIES, METRIC]
    return dice.groupby(keys, sort=False, as_index=False)[VALUE].mean().assign(**{REGION: AVERAGE})


def only_full(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the input with all modalities."""
    return results[results[MODALITIES] == results[MODALITIES].max()]


def difference(results: pd.DataFrame, first: str, second: str, *, samples: int = SAMPLES) -> dict[str, Any]:
    """First minus second in Dice points, over all subsets and regions that the results have, paired by seed and case.

    Returns
    -------
    ``difference``, ``by_seed``, ``cases``, ``low`` and ``high``: the 95 % interval over seeds and patients. With a
    single seed it is over patients, for these networks, and ``by_seed`` is empty.
    """
    table = regions_averaged(results)
    bootstrap = Bootstrap(patients_of(results), samples)
    found = compare(table, metric=DICE, models=[first, second], bootstrap=bootstrap).iloc[0]
    points = {name: 100 * float(found[name]) for name in (DIFFERENCE, LOW, HIGH)}
    by_seed = [100 * value for value in found.get(BY_TRAINING) or ()]
    return {**points, "by_seed": by_seed, "cases": int(found["cases"])}


def subset_differences(results: pd.DataFrame, first: str, second: str, *, samples: int = SAMPLES) -> pd.DataFrame:
    """First minus second in Dice points per subset (mean over regions), with intervals over seeds and patients.

    With several seeds they are not corrected for the number of subsets; with a single one they are, as in
    :func:`~nnunetv2_mstkd.statistics.significance.compare_subsets`.
    """
    table = regions_averaged(results)
    bootstrap = Bootstrap(patients_of(results), samples)
    found = compare_subsets(table, models=[first, second], metric=DICE, bootstrap=bootstrap)
    found[[DIFFERENCE, LOW, HIGH]] *= 100
    return found[[SUBSET, MODALITIES, DIFFERENCE, LOW, HIGH]]


def best_of(results: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The model of the highest mean over cases, subsets and regions among those that have results."""
    table = regions_averaged(results)
    means = table[table[MODEL].isin(names)].groupby(MODEL)[VALUE].mean()
    return None if means.empty else str(means.idxmax())


def verdict(
    results: pd.DataFrame,
    *,
    student: str,
    controls: Sequence[str],
    floor: str,
    training_cases: int,
    samples: int = SAMPLES,
) -> list[Finding]:
    """What the comparison was to show, each line met, missed or open.

    Parameters
    ----------
    results:
        see :data:`nnunetv2_mstkd.evaluation.results.COLUMNS`; seeds as ``training``, all subsets.
    student, controls, floor:
        models: the one that is claimed to be better, all that it must beat, and nnU-Net with all modalities.
    training_cases:
        of the data.
    """
    there = set(results[MODEL])
    if student not in there:
        return [Finding("the student was trained and evaluated", f"no results of {student}", None)]
    own = results[results[MODEL] == student]
    seeds, cases = own[TRAINING].nunique(), own[CASE].nunique()
    findings = [
        Finding(f"at least {SEEDS} seeds", str(seeds), seeds >= SEEDS),
        Finding(
            f"at least {TRAINING_CASES} training and {TEST_CASES} test cases",
            f"{training_cases} and {cases}",
            training_cases >= TRAINING_CASES and cases >= TEST_CASES,
        ),
    ]
    findings += _difficulty(results, floor)
    findings += _against_controls(results, student, controls, samples)
    findings.append(_full(results, student, floor, samples))
    return findings


def _difficulty(results: pd.DataFrame, floor: str) -> list[Finding]:
    table = only_full(results[(results[MODEL] == floor) & (results[METRIC] == DICE)])
    means = table.groupby(REGION)[VALUE].mean()
    findings = []
    for region, ceiling in CEILINGS.items():
        claim = f"hard enough: {floor} with all modalities below {100 * ceiling:.0f} for {region}"
        found = [value for name, value in means.items() if SHORT.get(str(name), name) == region]
        findings.append(
            Finding(claim, f"{100 * found[0]:.1f}", bool(found[0] < ceiling))
            if found
            else Finding(claim, "not measured", None)
        )
    return findings


def _against_controls(results: pd.DataFrame, student: str, controls: Sequence[str], samples: int) -> list[Finding]:
    there = set(results[MODEL])
    missing = [name for name in controls if name not in there]
    best = best_of(results, controls)
    gain = f"mean over subsets at least {GAIN} points above the best control"
    above = "better: the 95 % interval over seeds and cases lies above 0"
    worse = f"no subset worse (upper end of the 95 % interval over seeds and cases below {WORSE})"
    if best is None:
        return [Finding(claim, "no control was measured", None) for claim in (gain, above, worse)]
    lacking = f"; not measured: {', '.join(missing)}" if missing else ""
    found = difference(results, student, best, samples=samples)
    table = subset_differences(results, student, best, samples=samples)
    lost = table[table[HIGH] < WORSE]
    listed = ", ".join(f"{row[SUBSET]} {row[DIFFERENCE]:+.1f}" for _, row in lost.iterrows())
    least = table.loc[table[DIFFERENCE].idxmin()]
    intervals = table[HIGH].notna().all()
    # a control that was not run may be better still: the gain over it can only be smaller, the rest cannot be said
    enough, several = found[DIFFERENCE] >= GAIN, len(found["by_seed"]) > 1

    return [
        Finding(gain, f"{points(found)} over {best}{lacking}", None if missing and enough else enough),
        Finding(
            above,
            f"[{found[LOW]:+.2f}, {found[HIGH]:+.2f}], {found['cases']} cases{lacking}",
            None if missing or not several else found[LOW] > 0,
        ),
        Finding(
            worse,
            (listed or f"none; least {least[SUBSET]} {least[DIFFERENCE]:+.1f}, up to {least[HIGH]:+.1f}") + lacking,
            lost.empty if intervals and several and not missing else None,
        ),
    ]


def _full(results: pd.DataFrame, student: str, floor: str, samples: int) -> Finding:
    claim = f"with all modalities not below {floor} by more than {-FULL_LOSS} points"
    if floor not in set(results[MODEL]):
        return Finding(claim, f"{floor} was not measured", None)
    found = difference(only_full(results), student, floor, samples=samples)
    return Finding(claim, points(found), found[DIFFERENCE] >= FULL_LOSS)


def points(found: Mapping[str, Any]) -> str:
    """A difference with its interval and, where there are several, that of each seed."""
    by_seed = ", ".join(f"{value:+.2f}" for value in found["by_seed"])
    return f"{found[DIFFERENCE]:+.2f} [{found[LOW]:+.2f}, {found[HIGH]:+.2f}]{by_seed and f' (by seed {by_seed})'}"
