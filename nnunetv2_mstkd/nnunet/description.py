"""The dataset.json of a data set or model, and nnU-Net's reader for its images."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import read_json
from nnunetv2_mstkd.modalities import modality_names
from nnunetv2_mstkd.nnunet.folders import find_dataset_folder
from nnunetv2_mstkd.nnunet.safe_plans import find_class

READER = "image_reader_writer"


def check_description(dataset_json: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a dataset.json, read from ``source``, in which everything that the commands read is usable.

    Raises
    ------
    InputError
        If an entry is missing or impossible, such as a file ending that leads into another folder.
    """
    for key in ("labels", "file_ending"):
        if key not in dataset_json:
            raise InputError(f"{source} has no {key}, so it is not a complete dataset.json of nnU-Net v2")
    ending = dataset_json["file_ending"]
    if not isinstance(ending, str) or not re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending):
        raise InputError(f"file_ending in {source} is {ending!r}, expected an ending such as .nii.gz")
    if not isinstance(dataset_json["labels"], dict):
        raise InputError(f"labels in {source} is not a mapping of names to values")
    modality_names(dataset_json)
    return dataset_json


def read_description(file: Path) -> dict[str, Any]:
    """Read and check a dataset.json."""
    return check_description(read_json(file), str(file))


def foreground_heads(dataset_json: Mapping[str, Any]) -> dict[str, int]:
    """Return the output channel of each label but the background, or of each region, by name."""
    labels = foreground_values(dataset_json)
    if dataset_json.get("regions_class_order"):
        return {name: head for head, name in enumerate(labels)}
    return {name: values[0] for name, values in labels.items()}


def foreground_values(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the label values of each label or region but background and ignore label, by name."""
    labels = {name: np.atleast_1d(value).astype(int) for name, value in dataset_json["labels"].items()}
    return {name: tuple(values.tolist()) for name, values in labels.items() if name != "ignore" and np.any(values)}


def find_format(dataset: str | None, model: Path | None) -> tuple[dict[str, Any], type[BaseReaderWriter]]:
    """Find the dataset.json of a data set or model, and nnU-Net's reader for its images.

    Parameters
    ----------
    dataset
        Number or name of a data set, looked for below nnUNet_preprocessed, nnUNet_raw and nnUNet_results.
    model
        Folder of a trained model, instead.
    """
    if model is not None:
        plans_file = model / "plans.json"
        dataset_json = read_description(model / "dataset.json")
        return dataset_json, find_class(READER, read_json(plans_file).get(READER), str(plans_file))
    folders = _folders_of(str(dataset))
    description = next((folder / "dataset.json" for folder in folders if (folder / "dataset.json").is_file()), None)
    if description is None:
        raise MissingFileError(f"no dataset.json of data set {dataset}: none in {', '.join(map(str, folders))}")
    dataset_json = read_description(description)
    # the planner chose a reader by looking into the images; their file ending alone says less
    planned = next(_planned_readers(folders), None)
    if planned is not None:
        return dataset_json, planned
    with contextlib.suppress(ValueError):  # like nnU-Net, which then goes by the ending
        name = dataset_json.get("overwrite_image_reader_writer", "None")
        return dataset_json, find_class(READER, name, str(description))
    ending = dataset_json["file_ending"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return dataset_json, determine_reader_writer_from_file_ending(ending, verbose=False)
    except RuntimeError as error:
        raise InputError(f"nnU-Net has no image reader for {ending!r}, the file_ending in {description}") from error


def _folders_of(dataset: str) -> list[Path]:
    """All folders of a data set, and those of its models."""
    folders, problems = [], []
    for variable in ("nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results"):
        try:
            folder = find_dataset_folder(variable, dataset)
            folders += [folder, *sorted(folder.glob("*__*__*"))]
        except FileNotFoundError as error:
            problems.append(str(error))
    if not folders:
        raise MissingFileError(f"no dataset.json of data set {dataset}: {'; '.join(problems)}")
    return folders


def _planned_readers(folders: list[Path]) -> Iterator[type[BaseReaderWriter]]:
    """The readers that plans files name; files that name none, or something else, are passed over."""
    for file in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        with contextlib.suppress(ValueError):
            name = read_json(file).get(READER)
            if name is not None:
                yield find_class(READER, name, str(file))
