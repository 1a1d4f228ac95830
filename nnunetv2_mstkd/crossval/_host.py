"""What is needed of nnU-Net, until ``nnunetv2_mstkd.nnunet`` offers it: delete this file and import from there."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.configuration import read_plans as _read_plans
from nnunetv2_mstkd.nnunet.folders import nnunet_folder
from nnunetv2_mstkd.nnunet.model_folder import find_dataset_folder

# nnunet/folders.py
FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
CHECKPOINTS = (FINAL, LATEST, BEST)


def dataset_number(name: str) -> int:
    return int(name.removeprefix("Dataset").partition("_")[0])


def model_folder_name(trainer: str, plans: str, configuration: str) -> str:
    return f"{trainer}__{plans}__{configuration}"


# nnunet/splits.py
def read_splits(file: Path) -> list[dict[str, list[str]]]:
    return json.loads(file.read_text(encoding="utf-8"))


def number_of_folds(preprocessed: Path) -> int:
    splits = preprocessed / "splits_final.json"
    return len(read_splits(splits)) if splits.is_file() else 5


# nnunet/plans.py
def read_plans(file: Path) -> dict[str, Any]:
    return _read_plans(file)


def inherited(plans: Mapping[str, Any], name: str, key: str) -> Any:
    configurations = plans["configurations"]
    parent: str | None = name
    while parent is not None:
        if key in configurations[parent]:
            return configurations[parent][key]
        parent = configurations[parent].get("inherits_from")
    return None


# nnunet/trainers.py
def find_trainer(name: str) -> type:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_mstkd import methods
    from nnunetv2_mstkd.nnunet import registration

    if name in methods.__all__:
        return getattr(methods, name)
    registration.register()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = recursive_find_trainer_class_by_name(name)
    except (ImportError, RuntimeError):
        found = None
    if found is None:
        raise InputError(f"no trainer {name!r}: neither nnU-Net nor this package has it ({', '.join(methods.__all__)})")
    return found


__all__ = [
    "BEST",
    "CHECKPOINTS",
    "FINAL",
    "LATEST",
    "dataset_number",
    "find_dataset_folder",
    "find_trainer",
    "inherited",
    "model_folder_name",
    "nnunet_folder",
    "number_of_folds",
    "read_plans",
    "read_splits",
]
