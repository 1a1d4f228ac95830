"""What ``nnunet/splits.py`` and ``nnunet/trainers.py`` will offer: delete this file and import from there."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from nnunetv2_mstkd.errors import InputError


def read_splits(file: Path) -> list[dict[str, list[str]]]:
    return json.loads(file.read_text(encoding="utf-8"))


def number_of_folds(preprocessed: Path) -> int:
    splits = preprocessed / "splits_final.json"
    return len(read_splits(splits)) if splits.is_file() else 5


def find_trainer(name: str) -> type:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_mstkd.nnunet import registration

    registration.register()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"the trainer {name!r} was not found") from error
