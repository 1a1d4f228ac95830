"""Warnings about results that contradict what the modalities show.

Gadolinium makes the enhancing tumor visible on T1ce, and oedema is bright on T2 and FLAIR. Results that say otherwise
mostly mean swapped channels, a modality that was never removed, or images of another protocol. A warning needs
evidence: the interval over patients decides, so a few cases raise no alarm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.results import SEPARATOR, first_of
from nnunetv2_mstkd.metrics.conventions import DICE, REGION_SPELLINGS, known_name
from nnunetv2_mstkd.statistics.bootstrap import DEFAULT, Bootstrap, Cube, cube, mean
from nnunetv2_mstkd.statistics.shapley import MAX_MODALITIES, shapley_matrix, subset_columns

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "T1": ("t1", "t1n", "t1w", "t1-weighted", "t1_native"),
    "T1ce": ("t1ce", "t1c", "t1gd", "t1-ce", "t1_ce", "t1+c", "cet1", "t1post", "t1km"),
    "T2": ("t2", "t2w", "t2-weighted"),
    "FLAIR": ("flair", "t2f", "t2flair", "t2-flair", "t2_flair"),
}
"""Names in lower case under which data sets have these modalities."""

SLACK = 0.02
"""Smaller differences of the mean do not matter; 2 points of Dice."""

MIN_PATIENTS = 6
"""With fewer patients no two-sided test on paired differences can reach 5 % (2 / 2^6 = 3 %)."""


MIN_CASES = 3
"""In fewer cases two subsets may give the same values by chance."""


def plausibility_warnings(results: pd.DataFrame, *, bootstrap: Bootstrap = DEFAULT) -> list[str]:
    """Report the results of each model that contradict what the modalities show.

    The rules are: ET is better with T1ce than without it, and no modality adds more to it; WT from FLAIR or T2 alone is
    better than from T1 alone; the full input is not worse than a subset of it; two subsets do not give the same value
    in every case. A difference counts if its interval over patients lies above :data:`SLACK` entirely and there are at
    least :data:`MIN_PATIENTS` patients.

    The values are Dice. Only cases that have all evaluated subsets count, so that the same patients are compared.
    Modalities and regions are recognised by their usual names.

    Returns
    -------
    A sentence per finding. Rules without the subsets they need are skipped.
    """
    data = cube(results, DICE).complete_cases()
    if not data.cases:
        return []
    warnings: list[str] = []
    for m, model in enumerate(data.models):
        for r, region in enumerate(data.regions):
            evidence = _Evidence(data, data.values[m, :, :, r], bootstrap)
            of_region = {"ET": [_contrast_agent], "WT": [_oedema]}.get(known_name(region, REGION_SPELLINGS) or "", [])
            rules = [_full_is_best, *of_region]
            warnings += [f"{model}, {region}: {text}" for rule in rules for text in rule(evidence)]
        warnings += _identical(data, m)
    return warnings


class _Evidence:
    """The values of a model and a region, and how sure differences between its subsets are."""

    def __init__(self, data: Cube, values: np.ndarray, bootstrap: Bootstrap) -> None:
        self.data, self.means = data, mean(values, axis=0)  # the mean of each subset
        self._bootstrap, self._groups = bootstrap, bootstrap.groups(data.cases)
        self._resampled = bootstrap.means(values, self._groups)
        self.enough = len(np.unique(self._groups)) >= MIN_PATIENTS

    def modality(self, known: str) -> str | None:
        """This data set's name of a modality."""
        return next((name for name in self.data.modalities if known_name(name, SPELLINGS) == known), None)

    def value(self, subset: str) -> float:
        return float(self.means[self.data.subsets.index(subset)])

    def limits(self, weights: Mapping[str, float], candidates: int = 1) -> tuple[float, float]:
        """The interval of a weighted sum of subsets, which has to be the extreme one of several candidates."""
        used = [self.data.subsets.index(subset) for subset in weights]
        resampled = self._resampled[:, used] @ np.array(list(weights.values()))
        level = 1 - (1 - self._bootstrap.level) / candidates
        low, high = self._bootstrap.limits(resampled, self._groups, level)
        return float(low), float(high)

    def exceeds(self, weights: Mapping[str, float], candidates: int = 1) -> bool:
        """Whether a weighted sum of subsets is above :data:`SLACK`, beyond chance."""
        return self.enough and self.limits(weights, candidates)[0] > SLACK


def _full_is_best(evidence: _Evidence) -> Iterator[str]:
    data = evidence.data
    if data.sizes[-1] < len(data.modalities) or np.isnan(evidence.means).all():
        return
    full, best = data.subsets[-1], data.subsets[int(np.nanargmax(evidence.means))]
    if best != full and evidence.exceeds({best: 1, full: -1}, candidates=len(data.subsets) - 1):
        yield (
            f"{best} is better ({100 * evidence.value(best):.1f}) than the full input "
            f"({100 * evidence.value(full):.1f}). Are the channels in the order of the training?"
        )


def _contrast_agent(evidence: _Evidence) -> Iterator[str]:
    data, contrast = evidence.data, evidence.modality("T1ce")
    if contrast is None or not evidence.enough:
        return
    by_members = {frozenset(subset.split(SEPARATOR)): subset for subset in data.subsets}
    pairs = [
        (subset, by_members[members - {contrast}])
        for members, subset in by_members.items()
        if contrast in members and members - {contrast} in by_members
    ]
    if pairs:
        weights = {subset: sign / len(pairs) for pair in pairs for subset, sign in zip(pair, (1, -1), strict=True)}
        if evidence.limits(weights)[1] <= 0:
            gain = np.mean([evidence.value(with_it) - evidence.value(without) for with_it, without in pairs])
            yield (
                f"adding {contrast} changes the mean by {100 * gain:+.1f} points, yet only {contrast} shows "
                f"enhancement. Are channels swapped, or was {contrast} not removed where it should be missing?"
            )
    if len(data.subsets) == 2 ** len(data.modalities) - 1 and len(data.modalities) <= MAX_MODALITIES:
        ordered = [data.subsets[column] for column in subset_columns(data)]
        rows = dict(zip(data.modalities, shapley_matrix(len(data.modalities))[:, 1:], strict=True))
        shares = {name: sum(row * [evidence.value(subset) for subset in ordered]) for name, row in rows.items()}
        best = max(shares, key=lambda name: shares[name])
        difference = dict(zip(ordered, rows[best] - rows[contrast], strict=True))
        if best != contrast and evidence.exceeds(difference, candidates=len(rows) - 1):
            yield (
                f"{best} adds more than {contrast}, by {100 * (shares[best] - shares[contrast]):.1f} points of Shapley "
                f"value. Are these two channels swapped?"
            )


def _oedema(evidence: _Evidence) -> Iterator[str]:
    names = {known: evidence.modality(known) for known in ("T1", "T2", "FLAIR")}
    alone = {known: name for known, name in names.items() if name in evidence.data.subsets}
    if "T1" not in alone or len(alone) == 1:
        return
    t1 = alone.pop("T1")
    best = max(alone.values(), key=evidence.value)
    if evidence.exceeds({t1: 1, best: -1}):
        yield (
            f"{t1} alone is better ({100 * evidence.value(t1):.1f}) than {best} alone "
            f"({100 * evidence.value(best):.1f}), yet oedema is bright there and hardly seen on {t1}. Are channels "
            f"swapped?"
        )


def _identical(data: Cube, m: int) -> Iterator[str]:
    """Subsets with the same values in all cases and regions: the modality between them was never removed."""
    if len(data.cases) < MIN_CASES:
        return
    groups: dict[bytes, list[str]] = {}
    for subset, values in zip(data.subsets, data.values[m].transpose(1, 0, 2), strict=True):
        # perfect, empty and missing values repeat by themselves
        if np.any((values > 0) & (values < 1)):
            groups.setdefault(values.tobytes(), []).append(subset)
    for subsets in groups.values():
        if len(subsets) > 1:
            yield (
                f"{data.models[m]}: {first_of(subsets)} give the same value in every case. Were modalities removed "
                f"that should be missing?"
            )
