"""The cases of each fold, for data sets that nnU-Net's own split does not suit: it always makes five folds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

MAX_FOLDS = 5
SEED = 12345
"""nnU-Net's own, so that five folds of one data set are the same with and without this module."""

Splits = list[dict[str, list[str]]]
"""What ``splits_final.json`` holds: for each fold the cases to train on and those to validate on."""


def cross_validation(cases: Sequence[str], folds: int | None = None, seed: int = SEED) -> Splits:
    """Deal the cases out to folds of equal size, each case validating once.

    Parameters
    ----------
    cases
        Names of the training cases.
    folds
        How many; default 5, or as many as there are cases.
    seed
        Of the order in which the cases are dealt out.

    Raises
    ------
    ValueError
        If there are not 2 to ``len(cases)`` folds.
    """
    folds = min(MAX_FOLDS, len(cases)) if folds is None else folds
    if not 2 <= folds <= len(cases):
        raise ValueError(f"{folds} folds of {len(cases)} training cases, expected at least 2 and at most one per case")
    # Imported here because it brings scikit-learn, which only this needs.
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    splits = generate_crossval_split(sorted(cases), seed=seed, n_splits=folds)
    return [{part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in splits]


def hold_out(cases: Sequence[str], validation: Sequence[str]) -> Splits:
    """Make one fold that validates on the named cases and trains on the others.

    Raises
    ------
    ValueError
        If a name is no training case, or if none is left to train on.
    """
    unknown = sorted(set(validation) - set(cases))
    if unknown:
        raise ValueError(f"validation cases {', '.join(unknown)} are no training cases, which are {', '.join(cases)}")
    train = sorted(set(cases) - set(validation))
    if not train or not validation:
        raise ValueError(f"{len(validation)} of {len(cases)} training cases validate, expected some, but not all")
    return [{"train": train, "val": sorted(set(validation))}]


def write_splits(splits: Splits, path: Path) -> None:
    """Write ``splits_final.json`` in one step, making its folder where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(splits, indent=4) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
