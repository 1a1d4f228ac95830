"""What an evaluation needs from nnU-Net: validation cases, preprocessed data, raw images, and its exporter's labels."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_mstkd.errors import ExistingFileError, InputError, MissingFileError
from nnunetv2_mstkd.inference.input_folder import Case
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.configuration import BLOCK
from nnunetv2_mstkd.nnunet.model_folder import read_json

DATA_KEYS = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "resampling_fn_data",
    "resampling_fn_data_kwargs",
)  # fmt: skip
"""The entries of a configuration that preprocessed data depend on."""


# ---- folders and splits --------------------------------------------------------------------------------------------


def trained_folds(folder: Path, checkpoint: str) -> tuple[int | str, ...]:
    """The numbers of all folds of a model that have this checkpoint; ``all`` has seen every case and is left out."""
    names = [path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")]
    folds = sorted(int(name) for name in names if name.isdigit())
    if not folds:
        hint = "fold_all is: -f all" if "all" in names else "train one, or take another checkpoint with -chk"
        raise MissingFileError(f"no fold of {folder} is finished (no fold_*/{checkpoint}); {hint}")
    return tuple(folds)


def refuse_same_folder(output: Path, other: Path, what: str) -> None:
    """Refuse an output folder that is a file, or another folder that must not change."""
    if output.exists() and not output.is_dir():
        raise ExistingFileError(f"the output folder {output} is a file; choose another one")
    if output.resolve() == other.resolve() or (output.exists() and other.exists() and output.samefile(other)):
        raise InputError(f"the output folder {output} is the {what}; choose another one")


def noted_split(checkpoint: Path) -> dict[str, list[str]] | None:
    """The split that a trainer of this package has noted in its checkpoint; None if it notes none."""
    noted = checkpoints.read(checkpoint).get(BLOCK)
    return noted.get("split") if isinstance(noted, dict) else None


def validation_cases(
    preprocessed: Path, data: Path, fold: int | str, noted: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """The names of a fold's validation cases, sorted.

    Parameters
    ----------
    preprocessed:
        Folder of the data set below nnUNet_preprocessed.
    data:
        Folder of its preprocessed cases, all of which belong to fold ``all``.
    fold:
        Number of the fold, or ``"all"``.
    noted:
        The split that the checkpoint notes, which takes precedence over the file; None: it notes none.
    """
    if noted is not None:
        names = list(noted["val"])
    elif fold == "all":
        names = identifiers(data)
    else:
        file = preprocessed / "splits_final.json"
        if not file.is_file():
            raise MissingFileError(f"no validation cases of fold {fold}: {file} does not exist")
        splits = _read_splits(file)
        if int(fold) >= len(splits):
            raise InputError(f"no validation cases of fold {fold}: {file} has the folds 0 to {len(splits) - 1}")
        names = splits[int(fold)]["val"]
    if not names:
        raise InputError(f"fold {fold} of {preprocessed.name} has no validation cases")
    return sorted(names)


def _read_splits(file: Path) -> list[dict[str, list[str]]]:
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
        return [{"val": [str(name) for name in split["val"]]} for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no list of splits of nnU-Net ({type(error).__name__}: {error})") from error


# ---- preprocessed and raw data -------------------------------------------------------------------------------------


def identifiers(data: Path) -> list[str]:
    """The names of all cases in a folder of preprocessed data."""
    try:
        return list(infer_dataset_class(str(data)).get_identifiers(str(data)))
    except (AssertionError, OSError, KeyError) as error:
        raise MissingFileError(f"{data} holds no preprocessed data of nnU-Net") from error


def read_preprocessed(folder: Path, name: str) -> tuple[np.ndarray, dict]:
    """A preprocessed case: float32 of shape (C, *spatial), and the properties for nnU-Net's exporter."""
    data, _, _, properties = infer_dataset_class(str(folder))(str(folder), [name]).load_case(name)
    properties.pop("class_locations", None)  # a large list of foreground voxels, for training only
    return np.asarray(data[:], dtype=np.float32), properties


def read_properties(folder: Path, name: str) -> dict:
    """The properties of a preprocessed case, without its voxels."""
    return infer_dataset_class(str(folder))(str(folder), [name]).load_case(name)[-1]


def check_preprocessed_with(file: Path, plans: PlansManager, configuration: ConfigurationManager) -> None:
    """Refuse preprocessed data if the plans file beside them differs from the model's plans in what the data depend on.

    Parameters
    ----------
    file:
        Plans file in the data set's folder; if there is none, nothing is known.
    plans, configuration:
        Those of the model.
    """
    if not file.is_file():
        return
    there = PlansManager(read_json(file))
    changed: list[str] = []
    for key in there.plans.get("configurations", {}):
        other = there.get_configuration(key).configuration
        if other.get("data_identifier") != configuration.data_identifier:
            continue
        keys = [key for key in DATA_KEYS if other.get(key) != configuration.configuration.get(key)]
        if there.transpose_forward != plans.transpose_forward:
            keys.append("transpose_forward")
        if not keys:
            return
        changed += keys
    if changed:
        raise InputError(
            f"{file} has another {changed[0]} than the plans that the model was trained with, so the preprocessed data "
            f"may not be the model's. Evaluate from the images: --mask-first, or -i IMAGES -l LABELS -o OUT"
        )


def preprocess_command(plans: PlansManager, configuration: ConfigurationManager) -> str:
    """The command that makes a configuration's preprocessed data."""
    number = int(plans.dataset_name[len("Dataset") :].split("_")[0])
    name = configuration.data_identifier.removeprefix(f"{plans.plans_name}_")
    return f"nnUNetv2_preprocess -d {number} -plans_name {plans.plans_name} -c {name}"


def training_cases(raw: Path, channels: int) -> dict[str, Case]:
    """The training cases of a folder below nnUNet_raw, by name; MissingFileError if an image does not exist."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = get_filenames_of_train_images_and_targets(str(raw), read_json(raw / "dataset.json"))
    cases = {}
    for name, entry in found.items():
        images = tuple(Path(path) for path in entry["images"])
        absent = next((path for path in images if not path.is_file()), None)
        if len(images) != channels:
            raise MissingFileError(f"{raw}: case {name} has {len(images)} images, expected {channels}")
        if absent is not None:
            raise MissingFileError(f"the image {absent} of case {name} does not exist")
        cases[name] = Case(str(name), images)
    return cases


# ---- prediction ----------------------------------------------------------------------------------------------------


def find_device(device: str | torch.device) -> torch.device:
    """A torch device, if this machine has it."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("-device is cuda (the default), but torch finds no CUDA GPU; use -device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("-device is mps, but torch finds no Apple GPU; use -device cpu")
    return torch.device(device)


def segment(
    logits: np.ndarray,
    properties: dict,
    plans: PlansManager,
    configuration: ConfigurationManager,
    labels: Any,
    *,
    threads: int = 1,
) -> np.ndarray:
    """Turn logits of the preprocessed image into labels of the original one, as nnU-Net's exporter does.

    Parameters
    ----------
    logits:
        Shape (K, *spatial).
    properties:
        From nnU-Net's preprocessor.
    plans, configuration:
        Those of the model.
    labels:
        nnU-Net's label manager, or one that delegates to it.
    threads:
        Threads for torch.
    """
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties, num_threads_torch=threads
    )


def free_memory(device: torch.device) -> None:
    """Free what nnU-Net's predictor keeps on the device between images."""
    compute_gaussian.cache_clear()
    empty_cache(device)
