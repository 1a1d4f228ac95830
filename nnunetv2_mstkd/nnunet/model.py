"""Loading a trained model into nnU-Net's predictor without executing anything that a file contains."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mstkd.errors import InputError, UnsupportedError
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet import registration as _register
from nnunetv2_mstkd.nnunet.model_folder import check_description, find_checkpoints, read_json
from nnunetv2_mstkd.nnunet.safe_plans import open_plans

TRUST = ". If you trust the model, --trust leaves the loading to nnU-Net"


def load_predictor(
    folder: Path,
    folds: Sequence[int | str],
    checkpoint: str = "checkpoint_final.pth",
    *,
    device: torch.device,
    trust: bool = False,
    **options: Any,
) -> nnUNetPredictor:
    """nnU-Net's predictor, with the weights of one or several folds.

    Parameters
    ----------
    folder:
        of a trained model: plans.json, dataset.json and ``fold_X/checkpoint``.
    folds, checkpoint:
        which weights; the logits of several folds are averaged, as nnU-Net does.
    device:
        where the network runs.
    trust:
        let nnU-Net load the files: it unpickles them, which executes whatever they contain.
    options:
        of ``nnUNetPredictor``: ``tile_step_size``, ``use_mirroring`` ...

    Raises
    ------
    FileNotFoundError, ValueError
        if something is missing, damaged or does not fit together.
    NotImplementedError
        for the second stage of a cascade.
    """
    files = find_checkpoints(folder, folds, checkpoint)
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    _register.register()
    with _quiet():  # it prints that perform_everything_on_device is for CUDA only
        predictor = nnUNetPredictor(device=device, **options)
    if trust:
        with _quiet():
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
        _refuse_cascade(predictor.configuration_manager)
        return predictor

    contents = [_read_checkpoint(file) for file in files]
    name, configuration = _common(contents, files, "trainer_name"), _common(contents, files, "configuration")
    source = str(folder / "plans.json")
    if configuration not in plans.get("configurations", {}):
        raise InputError(
            f"{files[0]} was trained with the configuration {configuration!r}, which {source} does not have: the files "
            f"are of different models"
        )
    manager, settings = open_plans(plans, configuration, source, TRUST)
    _refuse_cascade(settings)
    check_description(dataset_json, str(folder / "dataset.json"))
    trainer = find_trainer(name)
    try:
        network = trainer.build_network_architecture(
            manager,
            settings,
            determine_num_input_channels(manager, settings, dataset_json),
            manager.get_label_manager(dataset_json).num_segmentation_heads,
            enable_deep_supervision=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # the layers get whatever numbers the file has, and each complains in its own way
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{source} describes no network that {name} can build ({text})") from error
    weights = [content["network_weights"] for content in contents]
    # each one fits before the first case is predicted; the first fold's stay in, as in nnU-Net's own loader
    for file, tensors in reversed(list(zip(files, weights, strict=True))):
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(
                f"the weights in {file} do not fit the network of {folder / 'plans.json'} "
                f"({str(error).splitlines()[0]}): the files are of different models"
            ) from error
    axes = contents[0].get("inference_allowed_mirroring_axes")
    if axes is not None and not set(axes) <= set(range(len(settings.patch_size))):
        raise InputError(f"inference_allowed_mirroring_axes in {files[0]} is {axes!r}, expected axes of the patch")
    predictor.manual_initialization(network, manager, settings, weights, dataset_json, name, axes)
    return predictor


def plain_network(predictor: nnUNetPredictor) -> torch.nn.Module:
    """The predictor's network without the wrapper of torch.compile."""
    return getattr(predictor.network, "_orig_mod", predictor.network)


def set_availability(predictor: nnUNetPredictor, availability: Sequence[bool] | None) -> None:
    """Tell the network which modalities the next case has, if it is one that asks; None: nothing is known.

    A network asks by having an attribute ``availability``; it gets a tensor of bool, shape (1, C), on the device.
    """
    network: Any = plain_network(predictor)
    if hasattr(network, "availability"):
        row = None if availability is None else torch.tensor([list(availability)], dtype=torch.bool)
        network.availability = None if row is None else row.to(predictor.device)


def set_student(predictor: nnUNetPredictor, number: int) -> None:
    """Let one of a network's students predict instead of their mean; ``number`` counts from 1.

    Raises
    ------
    ValueError
        if the model has no students, or fewer.
    """
    network: Any = plain_network(predictor)
    students = len(getattr(network, "students", ()))
    if not 1 <= number <= students:
        has = f"students 1 to {students}" if students else "one network and no students"
        raise InputError(f"--student is {number}, but the model ({predictor.trainer_name}) has {has}")
    network.only = number - 1


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The trainer class of this name, as nnU-Net finds it.

    Raises
    ------
    ValueError
        if there is none, or one whose network cannot be built here.
    """
    try:
        if not name.isidentifier():
            raise RuntimeError
        with _quiet():
            trainer = recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"the trainer {name!r} of the checkpoint was not found; install the package that has it, or set "
            f"{_register.EXTERNAL_TRAINERS} to its folder"
        ) from error
    if "plans_manager" not in inspect.signature(trainer.build_network_architecture).parameters:
        raise InputError(
            f"the trainer {name} builds its network with the signature of nnU-Net before 2.7; --trust leaves the "
            f"loading to nnU-Net"
        )
    return trainer


def _read_checkpoint(file: Path) -> dict[str, Any]:
    try:
        content = checkpoints.read(file)
    except ValueError as error:
        if "is refused" not in str(error):
            raise
        raise InputError(f"{error}{TRUST}") from error
    try:
        content["configuration"] = content["init_args"]["configuration"]
        content["trainer_name"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is no checkpoint of nnU-Net v2: it has no {error}") from error
    return content


def _common(contents: Sequence[dict], files: Sequence[Path], key: str) -> str:
    """The value that all folds must share."""
    for content, file in zip(contents, files, strict=True):
        if content[key] != contents[0][key]:
            raise InputError(
                f"the folds are of different models: {key.replace('_', ' ')} is {contents[0][key]} in {files[0]} and "
                f"{content[key]} in {file}"
            )
    return str(contents[0][key])


def _refuse_cascade(configuration: ConfigurationManager) -> None:
    if configuration.previous_stage_name is not None:
        raise UnsupportedError(
            f"this model is the second stage of a cascade (after {configuration.previous_stage_name}), which mstkd "
            f"does not support; write the absent channels with mstkd fill-missing and use nnUNetv2_predict"
        )


@contextlib.contextmanager
def _quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield
