"""Finding, checking and loading the frozen full-modality teacher of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.folders import FINAL, model_folder_name
from nnunetv2_mstkd.nnunet.plans import BLOCK, lineage
from nnunetv2_mstkd.nnunet.safe_plans import open_plans
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.settings import Settings


class Teacher(NamedTuple):
    """A frozen teacher and who it is.

    Attributes
    ----------
    network:
        on the device, ``eval()``, no gradients, no deep supervision.
    weights:
        its tensors by name, for the student's warm start.
    identity:
        ``trainer``, ``path`` below nnUNet_results and ``sha256`` of the weights; what a student's checkpoint keeps.
    settings:
        what it was built with.
    """

    network: torch.nn.Module
    weights: dict[str, torch.Tensor]
    identity: dict[str, str]
    settings: Settings


def teacher_configuration(
    results_folder: Path,
    *,
    trainer: str,
    plans: Mapping,
    configuration: str,
    fold: int | str,
    wanted: str | None,
) -> str:
    """The configuration whose teacher a student learns from: finished, else begun, else to be trained.

    Parameters
    ----------
    results_folder:
        nnUNet_results/DatasetXXX_NAME.
    trainer, plans, configuration, fold:
        the teacher's trainer, and the student's plans, configuration and fold.
    wanted:
        setting ``teacher.configuration``; None: the first of the student's own configuration and its parents that
        has a teacher. Where none has, the most general one with the student's network: one teacher for many students.
    """
    if wanted is not None:
        return wanted
    configurations = list(lineage(plans, configuration))
    for checkpoint in (FINAL, "checkpoint_*.pth"):
        for name in configurations:
            if any(_fold_folder(results_folder, trainer, plans, name, fold).glob(checkpoint)):
                return name
    return [name for name in configurations if _same_network(plans, name, configuration)][-1]


def _fold_folder(results_folder: Path, trainer: str, plans: Mapping, configuration: str, fold: int | str) -> Path:
    return results_folder / model_folder_name(trainer, plans["plans_name"], configuration) / f"fold_{fold}"


def find_teacher(
    results_folder: Path,
    *,
    trainer: str,
    plans: Mapping,
    configuration: str,
    fold: int | str,
    wanted: str | None,
    dataset: str | int,
) -> Path:
    """The teacher's final checkpoint.

    Parameters
    ----------
    results_folder, trainer, plans, configuration, fold, wanted:
        see :func:`teacher_configuration`.
    dataset:
        for the message: what to write after nnUNetv2_train.

    Raises
    ------
    FileNotFoundError
        with the command that trains the missing teacher.
    """
    name = teacher_configuration(
        results_folder, trainer=trainer, plans=plans, configuration=configuration, fold=fold, wanted=wanted
    )
    folder = _fold_folder(results_folder, trainer, plans, name, fold)
    if (folder / FINAL).is_file():
        return folder / FINAL
    command = f"nnUNetv2_train {dataset} {name} {fold} -tr {trainer}"
    if plans["plans_name"] != "nnUNetPlans":
        command += f" -p {plans['plans_name']}"
    if any(folder.glob("checkpoint_*.pth")):
        raise MissingFileError(
            f"the teacher of fold {fold} is not finished: {folder} has no {FINAL}. Continue it first: {command} --c"
        )
    raise MissingFileError(f"no teacher for fold {fold}: {folder / FINAL} does not exist. Train it first: {command}")


def _same_network(plans: Mapping, first: str, second: str) -> bool:
    manager = PlansManager(dict(plans))
    one, other = (manager.get_configuration(name).configuration for name in (first, second))
    return all(one.get(key) == other.get(key) for key in ("patch_size", "spacing", "architecture"))


def load_teacher(
    path: Path,
    *,
    results_root: Path,
    trainer: type[SettingsTrainer],
    student_configuration: ConfigurationManager,
    student_plans: PlansManager,
    dataset_json: Mapping,
    split: Mapping[str, list[str]],
    device: torch.device,
) -> Teacher:
    """Read a teacher, compare it with the student and freeze it.

    Raises
    ------
    ValueError
        if file or teacher do not fit; the message names the difference with both values.
    """
    content = checkpoints.read(path)
    try:
        found, arguments = content["trainer_name"], content["init_args"]
        given_plans, name, teacher_json = (arguments[key] for key in ("plans", "configuration", "dataset_json"))
    except (KeyError, TypeError) as error:
        raise InputError(f"teacher {path} is no checkpoint of nnU-Net v2: it has no {error}") from error
    if found != trainer.__name__:
        raise InputError(f"teacher {path} was trained with {found}, expected {trainer.__name__}")
    # a teacher may come from elsewhere: what its plans name is looked at before anything is built from them
    plans, configuration = open_plans(given_plans, name, f"teacher {path}")
    _compare(
        path,
        _facts(plans, configuration, teacher_json, (content.get(BLOCK) or {}).get("split")),
        _facts(student_plans, student_configuration, dataset_json, split),
    )
    network = trainer.build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, teacher_json),
        plans.get_label_manager(teacher_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    weights = content["network_weights"]
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"the weights in teacher {path} do not fit the network of its own plans ({str(error).splitlines()[0]}); "
            f"train the teacher again"
        ) from error
    identity = {
        "trainer": trainer.__name__,
        "path": path.relative_to(results_root).as_posix(),
        "sha256": checkpoints.fingerprint(weights),
    }
    network = network.to(device).eval().requires_grad_(False)
    return Teacher(network, weights, identity, trainer.read_settings(configuration, strict=False))


def _facts(plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping, split) -> dict[str, Any]:
    """What teacher and student must have in common. Names of configurations, weights and epochs may differ."""
    return {
        "spacing": list(configuration.spacing),
        "patch size": list(configuration.patch_size),
        "normalisation": list(configuration.normalization_schemes),
        "use of a mask for normalisation": list(configuration.use_mask_for_norm),
        "axis order (transpose_forward)": list(plans.transpose_forward),
        "channels": list((dataset_json.get("channel_names") or dataset_json["modality"]).values()),
        "labels": {name: value for name, value in dataset_json["labels"].items()},
        "region order": dataset_json.get("regions_class_order"),
        "training cases of the fold": (split or {}).get("train"),
        "validation cases of the fold": (split or {}).get("val"),
    }


def _compare(path: Path, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    for name, found in teacher.items():
        if found != student[name]:
            raise InputError(
                f"teacher {path} does not fit the student: {name} is {_short(found, student[name])} for the teacher "
                f"and {_short(student[name], found)} for the student. Train the teacher again with the student's "
                f"plans and splits"
            )


def _short(value: Any, other: Any) -> str:
    """``value`` as text; of a long list (cases of a fold) only the entries that the other list does not have."""
    text = repr(value)
    if len(text) > 160 and isinstance(value, list) and isinstance(other, list):
        text = f"a list of {len(value)} that alone has {[entry for entry in value if entry not in other]!r}"
    return text if len(text) <= 160 else text[:157] + "..."
