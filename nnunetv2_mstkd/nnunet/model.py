"""Loading a trained model into nnU-Net's predictor without executing anything that a file contains."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd.errors import InputError, UnsupportedError
from nnunetv2_mstkd.images.atomic import read_json
from nnunetv2_mstkd.nnunet import checkpoints, per_channel, registration
from nnunetv2_mstkd.nnunet.description import check_description
from nnunetv2_mstkd.nnunet.folders import FINAL, find_checkpoints
from nnunetv2_mstkd.nnunet.safe_plans import open_plans
from nnunetv2_mstkd.nnunet.trainers import find_trainer

TRUST = ". If you trust the model, --trust leaves the loading to nnU-Net"


@per_channel.applied()
def load_predictor(
    folder: Path,
    folds: Sequence[int | str],
    checkpoint: str = FINAL,
    *,
    device: torch.device,
    trust: bool = False,
    **options: Any,
) -> nnUNetPredictor:
    """Make nnU-Net's predictor with the weights of one or several folds.

    Parameters
    ----------
    folder
        Folder of a trained model: plans.json, dataset.json and ``fold_X/checkpoint``.
    folds
        Folds whose weights are used; the logits of several are averaged, as nnU-Net does.
    trust
        Let nnU-Net load the files: it unpickles them, which executes whatever they contain.
    options
        Options of ``nnUNetPredictor``: ``tile_step_size``, ``use_mirroring`` ...
    """
    if not 0 < options.get("tile_step_size", 0.5) <= 1:
        raise InputError(f"the step size is {options['tile_step_size']}, expected above 0 and at most 1")
    files = find_checkpoints(folder, folds, checkpoint)
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    registration.register()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that perform_everything_on_device is for CUDA only
        predictor = nnUNetPredictor(device=device, **options)
        if trust:
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
    if trust:
        _refuse_cascade(predictor.configuration_manager)
        return predictor

    contents = [_read_checkpoint(file) for file in files]
    trainer, name = (_common(contents, files, key) for key in ("trainer_name", "configuration"))
    source = str(folder / "plans.json")
    if name not in plans.get("configurations", {}):
        raise InputError(
            f"{files[0]} was trained with the configuration {name!r}, which {source} does not have: the files are of "
            f"different models"
        )
    manager, configuration = open_plans(plans, name, source, TRUST)
    _refuse_cascade(configuration)
    check_description(dataset_json, str(folder / "dataset.json"))
    network = _build(trainer, manager, configuration, dataset_json, source)
    weights = [content["network_weights"] for content in contents]
    _load_weights(network, weights, files, source)
    axes = contents[0].get("inference_allowed_mirroring_axes")
    if axes is not None and not set(axes) <= set(range(len(configuration.patch_size))):
        raise InputError(f"inference_allowed_mirroring_axes in {files[0]} is {axes!r}, expected axes of the patch")
    predictor.manual_initialization(network, manager, configuration, weights, dataset_json, trainer, axes)
    return predictor


def find_device(device: str | torch.device) -> torch.device:
    """Return a torch device, if this machine has it; ``"auto"`` is CUDA, or else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"the device is {device!r}, expected 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("-device is cuda (the default), but torch finds no CUDA GPU; use -device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("-device is mps, but torch finds no Apple GPU; use -device cpu")
    return torch.device(device)


def plain_network(network: torch.nn.Module) -> torch.nn.Module:
    """Return a network without the wrapper of torch.compile."""
    return getattr(network, "_orig_mod", network)


def free_memory(device: torch.device) -> None:
    """Free what nnU-Net's predictor keeps between images."""
    compute_gaussian.cache_clear()
    empty_cache(device)


@contextlib.contextmanager
def watched(predictor: nnUNetPredictor, on_pass: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report how far the prediction of one case in the block is, and let it be cancelled.

    Parameters
    ----------
    on_pass
        Called before each forward pass of the network, with how many are done and how many there are: one per patch,
        mirrored copy and fold. What it raises ends the prediction and leaves the block: the passes that are left give
        zeros, because nnU-Net's thread that cuts patches would outlive an exception and keep the case in memory.
    """
    if on_pass is None:
        yield
        return
    network, cut = predictor.network, predictor._internal_get_sliding_window_slicers
    forward, own = network.forward, vars(network).get("forward")  # that of a compiled network is no method
    heads = predictor.label_manager.num_segmentation_heads
    axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
    copies = 2 ** len(axes or ()) * len(predictor.list_of_parameters)
    done = total = 0
    error: Exception | None = None

    def patches(size: tuple[int, ...]) -> list:
        nonlocal total
        found = cut(size)
        total = len(found) * copies
        return found

    def one_pass(patch: torch.Tensor) -> torch.Tensor:
        nonlocal done, error
        if error is None:
            try:
                on_pass(done, total)
            except Exception as stop:
                error = stop
        if error is not None:
            return patch.new_zeros((len(patch), heads, *patch.shape[2:]))
        done += 1
        return forward(patch)

    network.forward, predictor._internal_get_sliding_window_slicers = one_pass, patches
    try:
        yield
    finally:
        del network.forward, predictor._internal_get_sliding_window_slicers
        if own is not None:
            network.forward = own
    if error is not None:
        raise error


def _build(
    name: str, plans: PlansManager, configuration: ConfigurationManager, dataset_json: dict[str, Any], source: str
) -> torch.nn.Module:
    """Build the network of a trainer, without deep supervision."""
    trainer = find_trainer(name)
    if "plans_manager" not in inspect.signature(trainer.build_network_architecture).parameters:
        raise InputError(
            f"the trainer {name} builds its network with the signature of nnU-Net before 2.7; --trust leaves the "
            f"loading to nnU-Net"
        )
    try:
        return trainer.build_network_architecture(
            plans,
            configuration,
            determine_num_input_channels(plans, configuration, dataset_json),
            plans.get_label_manager(dataset_json).num_segmentation_heads,
            enable_deep_supervision=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # layers get whatever numbers the file has, and each complains in its own way
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{source} describes no network that {name} can build ({text})") from error


def _load_weights(network: torch.nn.Module, weights: Sequence[dict], files: Sequence[Path], plans: str) -> None:
    """Load each fold's weights, so that all are known to fit; the first fold's stay, as in nnU-Net's own loader."""
    for file, tensors in reversed(list(zip(files, weights, strict=True))):
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(
                f"the weights in {file} do not fit the network of {plans} ({str(error).splitlines()[0]}): the files "
                f"are of different models"
            ) from error


def _read_checkpoint(file: Path) -> dict[str, Any]:
    content = checkpoints.read(file, hint=TRUST)
    try:
        content["configuration"] = content["init_args"]["configuration"]
        content["trainer_name"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not an nnU-Net v2 checkpoint: it has no {error}") from error
    return content


def _common(contents: Sequence[dict], files: Sequence[Path], key: str) -> str:
    """Return the value that all folds must share."""
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
