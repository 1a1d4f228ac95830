"""nnU-Net's splits_final.json: which cases a fold trains on and which it is validated on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_mstkd.errors import InputError, MissingFileError

SPLITS = "splits_final.json"
PARTS = ("train", "val", "test")
STANDARD_FOLDS = 5
"""How many folds nnU-Net makes where there is no splits_final.json."""


def read_splits(file: Path) -> list[dict[str, list[str]]]:
    """Read a ``splits_final.json``.

    Returns
    -------
    For each fold the names of its cases by part: ``train`` and ``val``, and ``test`` where the file has it.

    Raises
    ------
    MissingFileError, InputError
        If the file does not exist or is of another form.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise TypeError("no list of folds")
        return [{part: [str(case) for case in fold[part]] for part in PARTS if part in fold} for fold in content]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{file} is no list of splits such as nnU-Net's {SPLITS} ({type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        ) from error


def number_of_folds(preprocessed: Path) -> int:
    """Return how many folds a data set has: those of its ``splits_final.json``, or those that nnU-Net will make.

    Parameters
    ----------
    preprocessed
        Folder of the data set below nnUNet_preprocessed.
    """
    file = preprocessed / SPLITS
    return len(read_splits(file)) if file.is_file() else STANDARD_FOLDS


def validation_cases(
    preprocessed: Path,
    data: Path,
    fold: int | str,
    noted: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Return the names of a fold's validation cases, sorted.

    Parameters
    ----------
    preprocessed
        Folder of the data set below nnUNet_preprocessed.
    data
        Folder of its preprocessed cases, all of which belong to fold ``all``.
    fold
        Number of the fold, or ``"all"``.
    noted
        The split that a checkpoint notes (:func:`nnunetv2_mstkd.nnunet.checkpoints.noted_split`), which wins over the
        file; None: it notes none.

    Raises
    ------
    MissingFileError, InputError
        If the fold does not exist, or has no validation cases.
    """
    if noted is not None:
        names = list(noted["val"])
    elif fold == "all":
        from nnunetv2_mstkd.nnunet.preprocessing import identifiers

        names = identifiers(data)
    else:
        names = _of_fold(preprocessed / SPLITS, int(fold))
    if not names:
        raise InputError(f"fold {fold} of {preprocessed.name} has no validation cases")
    return sorted(names)


def _of_fold(file: Path, fold: int) -> list[str]:
    if not file.is_file():
        raise MissingFileError(f"no validation cases of fold {fold}: {file} does not exist")
    splits = read_splits(file)
    if fold >= len(splits):
        raise InputError(f"no validation cases of fold {fold}: {file} has the folds 0 to {len(splits) - 1}")
    if "val" not in splits[fold]:
        raise InputError(f"{file} is no list of splits such as nnU-Net's: fold {fold} has no entry val")
    return splits[fold]["val"]
