"""Finding the finished training that another one needs: its teacher, or the model that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mstkd.errors import MissingFileError
from nnunetv2_mstkd.nnunet.folders import FINAL, dataset_argument, model_folder_name
from nnunetv2_mstkd.nnunet.plans import BLOCK, inherited, lineage
from nnunetv2_mstkd.nnunet.trainers import find_trainer
from nnunetv2_mstkd.training.settings import InputSettings, ScheduleSettings, Settings, TeacherSettings

if TYPE_CHECKING:
    from nnunetv2_mstkd.training.base import SettingsTrainer


def configuration_with(
    results_folder: Path, *, trainer: str, plans: Mapping, configuration: str, fold: int | str, same: bool = False
) -> str:
    """Return the configuration in which a trainer has a training for another one: finished, else begun, else none yet.

    Parameters
    ----------
    results_folder
        nnUNet_results/DatasetXXX_NAME.
    trainer
        Name of the trainer that is looked for.
    plans, configuration, fold
        Of the training that needs it.
    same
        Look only at configurations with the same network.

    Returns
    -------
    The first of the training's own configuration and its parents that has one, if nothing that the trainer reads asks
    for another network, other cases or another normalisation there. Where none has, the most general one in which its
    training would be the same but for the schedule: one training for many.
    """
    usable, alike, cls = [], [], find_trainer(trainer)
    result, course = _asks_for(cls, plans, configuration)
    for name in lineage(plans, configuration):
        result_there, course_there = _asks_for(cls, plans, name)
        same_network = _same_network(plans, name, configuration)
        if result_there == result and (same_network or not same):
            usable.append(name)
        if (result_there, course_there) == (result, course) and same_network:
            alike.append(name)
    for checkpoint in (FINAL, "checkpoint_*.pth"):
        for name in usable:
            if any(_fold_folder(results_folder, trainer, plans, name, fold).glob(checkpoint)):
                return name
    return alike[-1]


def _asks_for(cls: type, plans: Mapping, configuration: str) -> tuple[list[Any], list[Any]]:
    """What a configuration says of a trainer's result (network, normalisation, cases), and of its course."""
    from nnunetv2_mstkd.training.base import SettingsTrainer  # which imports this module

    if not issubclass(cls, SettingsTrainer):
        return [], []
    settings = Settings.read(inherited(plans, configuration, BLOCK), cls.all_sections(), strict=False)
    result: list[Any] = [settings[section] for section in cls.network_sections()]
    result.append(settings[InputSettings].normalization)
    course: list[Any] = [settings[ScheduleSettings].starts_from(cls.__name__)]
    if TeacherSettings in settings:
        result.append(settings[TeacherSettings].cases)
        course.append(settings[TeacherSettings].epochs)
    return result, course


def finished_checkpoint(
    trainer: str, needed_by: SettingsTrainer, role: str, configuration: str | None = None, *, same: bool = False
) -> Path:
    """Return the final checkpoint of the training that another one needs.

    Parameters
    ----------
    trainer
        Name of its trainer.
    needed_by
        The training that needs it.
    role
        What it is to that training, for messages.
    configuration
        Its configuration; None: see :func:`configuration_with`.
    same
        See :func:`configuration_with`.

    Raises
    ------
    MissingFileError
        With the command that trains it, or continues its training.
    """
    results, plans, fold = Path(needed_by.output_folder_base).parent, needed_by.plans_as_given, needed_by.fold
    name = configuration or configuration_with(
        results, trainer=trainer, plans=plans, configuration=needed_by.configuration_name, fold=fold, same=same
    )
    folder = _fold_folder(results, trainer, plans, name, fold)
    if (folder / FINAL).is_file():
        return folder / FINAL
    dataset = dataset_argument(needed_by.plans_manager.dataset_name)
    command = f"nnUNetv2_train {dataset} {name} {fold} -tr {trainer}"
    if plans["plans_name"] != "nnUNetPlans":
        command += f" -p {plans['plans_name']}"
    if any(folder.glob("checkpoint_*.pth")):
        raise MissingFileError(
            f"the {role} of fold {fold} is not finished: {folder} has no {FINAL}. Continue it first: {command} --c"
        )
    raise MissingFileError(f"no {role} for fold {fold}: {folder / FINAL} does not exist. Train it first: {command}")


def _fold_folder(results_folder: Path, trainer: str, plans: Mapping, configuration: str, fold: int | str) -> Path:
    return results_folder / model_folder_name(trainer, plans["plans_name"], configuration) / f"fold_{fold}"


def _same_network(plans: Mapping, first: str, second: str) -> bool:
    manager = PlansManager(dict(plans))
    one, other = (manager.get_configuration(name).configuration for name in (first, second))
    return all(one.get(key) == other.get(key) for key in ("patch_size", "spacing", "architecture"))
