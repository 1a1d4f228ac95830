"""All trainers: this package's, and those that other installed packages register."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Any

from nnunetv2_mstkd import methods
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.settings import known_sections, section_problem

GROUP = "nnunetv2_mstkd.trainers"
"""Entry-point group in which another package names its trainers: ``MyTrainer = "my_package.trainer:MyTrainer"``."""


def trainers() -> dict[str, type[SettingsTrainer]]:
    """Return the trainers by name, this package's first. Their sections of the settings are known from then on.

    A registered trainer that cannot be imported, is no :class:`SettingsTrainer`, or takes a name that is in use, for
    itself or for a section, is left out with a warning: it must not stop the others.
    """
    found: dict[str, type[SettingsTrainer]] = {name: getattr(methods, name) for name in methods.__all__}
    for entry in entry_points(group=GROUP):
        try:
            trainer = entry.load()
            problem = _problem(entry.name, trainer, found)
        except Exception as error:  # whatever that package does when it is imported
            problem = f"it cannot be imported ({type(error).__name__}: {error})"
        if problem is None:
            found[entry.name] = trainer
        else:
            warnings.warn(f"the registered trainer {entry.name} ({entry.value}) is left out: {problem}", stacklevel=2)
    return found


def simplest_trainer(sections: Collection[str]) -> type[SettingsTrainer] | None:
    """Return the trainer for missing modalities that reads these sections of the settings, and the fewest others.

    None: no trainer reads all of them.
    """
    found = [
        trainer
        for trainer in trainers().values()
        if issubclass(trainer, ModalityDropoutTrainer)
        and set(sections) <= {section.NAME for section in trainer.all_sections()}
    ]
    return min(found, key=lambda trainer: (len(trainer.all_sections()), len(trainer.__mro__)), default=None)


def _problem(name: str, trainer: Any, found: dict[str, type[SettingsTrainer]]) -> str | None:
    if not (isinstance(trainer, type) and issubclass(trainer, SettingsTrainer)):
        return f"it does not derive from {SettingsTrainer.__module__}.{SettingsTrainer.__name__}"
    if trainer.__name__ != name:
        return f"its class is called {trainer.__name__}, and nnU-Net finds trainers by the name of their class"
    if found.get(name, trainer) is not trainer:
        return "another trainer has this name"
    known = known_sections()
    for section in trainer.all_sections():
        problem = section_problem(section)
        if problem is not None:
            return problem
        owner = known.get(section.NAME, section)
        if owner is not section:
            return (
                f"its section {section.__qualname__} is called {section.NAME!r}, like {owner.__module__}."
                f"{owner.__qualname__}; give it another NAME"
            )
    return None
