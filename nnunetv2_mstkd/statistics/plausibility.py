"""Warnings about results that contradict what the modalities show.

Gadolinium makes the enhancing tumour visible on T1ce, and oedema is bright on T2 and FLAIR. Results that say otherwise
mostly mean swapped channels, a modality that was never removed, or images of another protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import SEPARATOR
from nnunetv2_mstkd.metrics.conventions import metric_named
from nnunetv2_mstkd.statistics.bootstrap import Cube, cube, mean
from nnunetv2_mstkd.statistics.shapley import MAX_PLAYERS, shapley_matrix, subset_columns

SPELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "T1": ("t1", "t1n", "t1w", "t1-weighted", "t1_native"),
        "T1ce": ("t1ce", "t1c", "t1gd", "t1-ce", "t1_ce", "t1+c", "cet1", "t1post", "t1km"),
        "T2": ("t2", "t2w", "t2-weighted"),
        "FLAIR": ("flair", "t2f", "t2flair", "t2-flair", "t2_flair"),
    }
)
"""Names in lower case under which data sets have these modalities."""

REGION_SPELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ET": ("et", "enhancing tumor", "enhancing tumour", "enhancing"),
        "WT": ("wt", "whole tumor", "whole tumour", "whole"),
    }
)

SLACK = 0.02
"""Differences of the mean below it are noise; 2 points of Dice."""


def plausibility_warnings(results: pd.DataFrame, *, metric: str = "dice") -> list[str]:
    """Say which results of which model contradict what the modalities show.

    The rules are: ET is better with T1ce than without it, and no modality adds more to it; WT from FLAIR or T2 alone is
    better than from T1 alone; the full input is not clearly worse than a subset of it; two subsets do not give the same
    value in every case.

    Parameters
    ----------
    results:
        see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`; modalities and regions are known by their usual names.
    metric:
        one of which higher is better.

    Returns
    -------
    A sentence per finding; an empty list where nothing is strange. Rules without the subsets they need are skipped.
    """
    if metric_named(metric).better <= 0:
        raise InputError(f"the rules are about metrics of which higher is better, not {metric}")
    data = cube(results, metric)
    # (models, subsets, regions)
    means = mean(data.values, axis=1)
    warnings = []
    for m, model in enumerate(data.models):
        for r, region in enumerate(data.regions):
            of_subset = dict(zip(data.subsets, means[m, :, r].tolist(), strict=True))
            where = f"{model}, {region}"
            warnings += _full_is_best(of_subset, data, where)
            if _known(region, REGION_SPELLINGS) == "ET":
                warnings += _contrast_agent(of_subset, data, where)
            if _known(region, REGION_SPELLINGS) == "WT":
                warnings += _oedema(of_subset, data, where)
        warnings += _identical(data, m)
    return warnings


def _known(name: str, spellings: Mapping[str, tuple[str, ...]]) -> str | None:
    folded = name.strip().casefold()
    return next((known for known, others in spellings.items() if folded in others), None)


def _modality(known: str, modalities: Sequence[str]) -> str | None:
    """This data set's name of a modality."""
    return next((name for name in modalities if _known(name, SPELLINGS) == known), None)


def _contrast_agent(of_subset: dict[str, float], data: Cube, where: str) -> list[str]:
    contrast = _modality("T1ce", data.modalities)
    if contrast is None:
        return []
    by_members = {frozenset(subset.split(SEPARATOR)): value for subset, value in of_subset.items()}
    gains = [
        value - by_members[members - {contrast}]
        for members, value in by_members.items()
        if contrast in members and members - {contrast} in by_members
    ]
    warnings = []
    if gains and np.mean(gains) <= 0:
        warnings.append(
            f"{where}: adding {contrast} changes the mean by {100 * np.mean(gains):+.1f} points, yet only {contrast} "
            f"shows enhancement. Are channels swapped, or was {contrast} not removed where it should be missing?"
        )
    if len(data.subsets) == 2 ** len(data.modalities) - 1 and len(data.modalities) <= MAX_PLAYERS:
        values = np.array(list(of_subset.values()))[subset_columns(data)]
        shares = dict(zip(data.modalities, shapley_matrix(len(data.modalities))[:, 1:] @ values, strict=True))
        best = max(shares, key=lambda name: shares[name])
        if shares[best] > shares[contrast] + SLACK:
            warnings.append(
                f"{where}: {best} adds more ({100 * shares[best]:.1f} points of Shapley value) than {contrast} "
                f"({100 * shares[contrast]:.1f}). Are these two channels swapped?"
            )
    return warnings


def _oedema(of_subset: dict[str, float], data: Cube, where: str) -> list[str]:
    names = {known: _modality(known, data.modalities) for known in ("T1", "T2", "FLAIR")}
    alone = {known: of_subset[name] for known, name in names.items() if name in of_subset}
    if "T1" not in alone or len(alone) == 1:
        return []
    best = max((known for known in alone if known != "T1"), key=lambda known: alone[known])
    if alone["T1"] <= alone[best] + SLACK:
        return []
    return [
        f"{where}: {names['T1']} alone is better ({100 * alone['T1']:.1f}) than {names[best]} alone "
        f"({100 * alone[best]:.1f}), yet oedema is bright there and hardly seen on {names['T1']}. Are channels swapped?"
    ]


def _full_is_best(of_subset: dict[str, float], data: Cube, where: str) -> list[str]:
    if data.sizes[-1] < len(data.modalities):
        return []
    full = data.subsets[-1]
    best = max(of_subset, key=lambda subset: of_subset[subset])
    if not of_subset[best] > of_subset[full] + SLACK:
        return []
    return [
        f"{where}: {best} is better ({100 * of_subset[best]:.1f}) than the full input ({100 * of_subset[full]:.1f}). "
        f"Are the channels in the order of the training?"
    ]


def _identical(data: Cube, m: int) -> list[str]:
    """Subsets with the same values in all cases and regions: the modality between them was never looked at."""
    groups: dict[bytes, list[str]] = {}
    for subset, values in zip(data.subsets, data.values[m].transpose(1, 0, 2), strict=True):
        # perfect, empty and missing values repeat by themselves
        if np.any((values > 0) & (values < 1)):
            groups.setdefault(values.tobytes(), []).append(subset)
    warnings = []
    for subsets in groups.values():
        if len(subsets) > 1:
            more = f" and {len(subsets) - 3} more" if len(subsets) > 3 else ""
            warnings.append(
                f"{data.models[m]}: {', '.join(subsets[:3])}{more} give the same value in every case. Were modalities "
                f"removed that should be missing?"
            )
    return warnings
