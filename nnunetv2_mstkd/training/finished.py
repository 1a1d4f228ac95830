"""Finding the finished training that another one needs: its teacher, or the model that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mstkd.errors import MissingFileError
from nnunetv2_mstkd.nnunet.folders import FINAL, dataset_argument, model_folder_name
from nnunetv2_mstkd.nnunet.plans import lineage


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
    The first of the training's own configuration and its parents that has one. Where none has, the most general one
    with the same network: one training for many.
    """
    everywhere = list(lineage(plans, configuration))
    alike = [name for name in everywhere if _same_network(plans, name, configuration)]
    for checkpoint in (FINAL, "checkpoint_*.pth"):
        for name in alike if same else everywhere:
            if any(_fold_folder(results_folder, trainer, plans, name, fold).glob(checkpoint)):
                return name
    return alike[-1]


def finished_checkpoint(
    trainer: str, needed_by: nnUNetTrainer, role: str, configuration: str | None = None, *, same: bool = False
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
    results, plans, fold = Path(needed_by.output_folder_base).parent, needed_by.plans_manager.plans, needed_by.fold
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
