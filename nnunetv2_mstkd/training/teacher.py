"""Finding, checking and loading the frozen full-modality teacher of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet import checkpoints, per_channel
from nnunetv2_mstkd.nnunet.description import check_description
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.nnunet.safe_plans import open_plans
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.finished import finished_checkpoint
from nnunetv2_mstkd.training.settings import Settings, TeacherSettings


class Teacher(NamedTuple):
    """A frozen teacher and who it is."""

    network: torch.nn.Module
    """On the device, ``eval()``, no gradients, no deep supervision."""
    weights: dict[str, torch.Tensor]
    """Its tensors by name, for the student's warm start."""
    identity: dict[str, str]
    """``trainer``, ``path`` below nnUNet_results and ``sha256`` of the weights; what a student's checkpoint keeps."""
    settings: Settings
    """What it was built with."""


def find_teacher(trainer: type[SettingsTrainer], student: SettingsTrainer) -> Path:
    """Return the final checkpoint of a student's teacher.

    It is of ``teacher.configuration``, or of the first of the student's configuration and its parents that has one.

    Raises
    ------
    MissingFileError
        With the command that trains the missing teacher.
    """
    return finished_checkpoint(trainer.__name__, student, "teacher", student.settings[TeacherSettings].configuration)


def load_teacher(path: Path, trainer: type[SettingsTrainer], student: SettingsTrainer) -> Teacher:
    """Read a teacher, compare it with the student and freeze it.

    Raises
    ------
    InputError
        If file or teacher do not fit; the message names the difference with both values.
    """
    content = checkpoints.read(path)
    try:
        found, arguments = content["trainer_name"], content["init_args"]
        given_plans, name, dataset_json = (arguments[key] for key in ("plans", "configuration", "dataset_json"))
    except (KeyError, TypeError) as error:
        raise InputError(f"teacher {path} is not an nnU-Net v2 checkpoint: it has no {error}") from error
    if found != trainer.__name__:
        raise InputError(f"teacher {path} was trained with {found}, expected {trainer.__name__}")
    # a teacher may come from elsewhere: what its plans name is looked at before anything is built from them
    plans, configuration = open_plans(given_plans, name, f"teacher {path}")
    dataset_json = check_description(dataset_json, f"teacher {path}")
    split = (content.get(BLOCK) or {}).get("split") or {}
    _check_cases(path, split, student.split or {})
    _compare(
        path,
        _facts(plans, configuration, dataset_json, split),
        _facts(student.plans_manager, student.configuration_manager, student.dataset_json, student.split or {}),
    )
    for reason, cases in split.get("left_out", {}).items():
        if cases:
            student.print_to_log_file(f"left out of the teacher's training: {len(cases)} {reason}")
    with per_channel.applied():
        network = trainer.build_network_architecture(
            plans,
            configuration,
            determine_num_input_channels(plans, configuration, dataset_json),
            plans.get_label_manager(dataset_json).num_segmentation_heads,
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
        "path": path.relative_to(Path(student.output_folder_base).parents[1]).as_posix(),
        "sha256": checkpoints.fingerprint(weights),
    }
    network = network.to(student.device).eval().requires_grad_(False)
    return Teacher(network, weights, identity, trainer.read_settings(configuration, strict=False))


def _facts(
    plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping, split: Mapping
) -> dict[str, Any]:
    """What teacher and student must have in common. Names of configurations, weights and epochs may differ."""
    return {
        "spacing": list(configuration.spacing),
        "patch size": list(configuration.patch_size),
        "normalisation": list(configuration.normalization_schemes),
        "setting input.normalization": per_channel.normalization(configuration),
        "use of a mask for normalisation": list(configuration.use_mask_for_norm),
        "axis order (transpose_forward)": list(plans.transpose_forward),
        "channels": list((dataset_json.get("channel_names") or dataset_json["modality"]).values()),
        "labels": dict(dataset_json["labels"]),
        "region order": dataset_json.get("regions_class_order"),
        "training cases of the fold": _fold_cases(split),
        "validation cases of the fold": split.get("val"),
    }


def _fold_cases(split: Mapping[str, Any]) -> list[str] | None:
    """All training cases of a fold, those that a trainer has left out too."""
    if "train" not in split:
        return None
    left_out = [case for cases in split.get("left_out", {}).values() for case in cases]
    return sorted([*split["train"], *split.get("unlabelled", ()), *left_out])


def _check_cases(path: Path, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Refuse a teacher that was trained on a validation case of its student, even in a split of one name."""
    seen = sorted(set(teacher.get("train", ())) & set(student.get("val", ())) - set(student.get("train", ())))
    if seen:
        raise InputError(
            f"teacher {path} was trained on {len(seen)} validation cases of this fold, such as {seen[0]}; train the "
            f"teacher of this fold"
        )


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
