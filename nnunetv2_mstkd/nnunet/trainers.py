"""Finding the class that ``-tr NAME`` means to nnU-Net."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

from nnunetv2.training import nnUNetTrainer as nnunet_trainers
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_mstkd.errors import InputError, did_you_mean
from nnunetv2_mstkd.nnunet import registration


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """Find a trainer among nnU-Net's own, those of this package and those of ``nnUNet_extTrainer``."""
    registration.register()
    told: list[warnings.WarningMessage] = []
    try:
        if not name.isidentifier():
            raise RuntimeError("no name of a class")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as told:
            return _of_this_package(name) or recursive_find_trainer_class_by_name(name)
    except (ImportError, RuntimeError, AssertionError, TypeError) as error:
        # the search has imported every trainer that it can find
        hint = did_you_mean(name, sorted(_names(nnUNetTrainer)), cutoff=0.8)  # most end in Trainer
        reason = f": {error}" if isinstance(error, ImportError) else ""
        reason += "".join(f": {each.message}" for each in told if f" {name} " in str(each.message))
        raise InputError(
            f"the trainer {name!r} was not found{hint}{reason}; install the package that has it, or set "
            f"{registration.EXTERNAL_TRAINERS} to its folder"
        ) from error
    finally:
        for each in told:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _of_this_package(name: str) -> type[nnUNetTrainer] | None:
    """Return the trainer that the package has under this name; None if it has none, or nnU-Net might find another one.

    nnU-Net imports all of its own trainers before it looks here, which takes a second.
    """
    if registration.external_folders()[0] != registration.TRAINER_PATH or name in _words_of_nnunet():
        return None
    found = runpy.run_path(os.path.join(registration.TRAINER_PATH, "mstkd_trainers.py")).get(name)
    return found if isinstance(found, type) and issubclass(found, nnUNetTrainer) else None


@functools.cache
def _words_of_nnunet() -> frozenset[str]:
    """All words in the files in which nnU-Net looks for its own trainers."""
    files = (file for folder in nnunet_trainers.__path__ for file in Path(folder).rglob("*.py"))
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return frozenset(re.findall(r"\w+", "\n".join(texts)))


def _names(trainer: type) -> Iterator[str]:
    """The name of a class and those of all its subclasses."""
    yield trainer.__name__
    subclasses: list[type] = trainer.__subclasses__()
    for subclass in subclasses:
        yield from _names(subclass)
