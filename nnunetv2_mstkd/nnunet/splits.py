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
    """Read a ``splits_final.json``: each fold's cases by part, ``train`` and ``val``, and ``test`` where it has it."""
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise TypeError("no list of folds")
        return [{part: [str(case) for case in fold[part]] for part in PARTS if part in fold} for fold in content]
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{file} is not a list of splits such as nnU-Net's {SPLITS} ({reason})") from error


def number_of_folds(preprocessed: Path) -> int:
    """Return how many folds the data set of a folder in nnUNet_preprocessed has, or will get from nnU-Net."""
    file = preprocessed / SPLITS
    return len(read_splits(file)) if file.is_file() else STANDARD_FOLDS


def validation_cases(
    preprocessed: Path, data: Path, fold: int | str, noted: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Return the names of a fold's validation cases, sorted.

    Parameters
    ----------
    preprocessed
        Folder of the data set below nnUNet_preprocessed.
    data
        Folder of its preprocessed cases, all of which belong to fold ``"all"``.
    noted
        The split that a checkpoint notes (:func:`nnunetv2_mstkd.nnunet.checkpoints.read_notes`), which wins over the
        file; None: it notes none.
    """
    file = preprocessed / SPLITS
    if noted is not None:
        names = noted["val"]
    elif fold == "all":
        from nnunetv2_mstkd.nnunet.preprocessing import identifiers

        names = identifiers(data)
    elif not file.is_file():
        raise MissingFileError(f"no validation cases of fold {fold}: {file} does not exist")
    else:
        splits = read_splits(file)
        if int(fold) >= len(splits):
            raise InputError(f"no validation cases of fold {fold}: {file} has the folds 0 to {len(splits) - 1}")
        if "val" not in splits[int(fold)]:
            raise InputError(f"{file} is not a list of splits such as nnU-Net's: fold {fold} has no entry val")
        names = splits[int(fold)]["val"]
    if not names:
        raise InputError(f"fold {fold} of {preprocessed.name} has no validation cases")
    return sorted(names)
