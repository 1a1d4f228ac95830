"""Finding a trained model below nnUNet_results, or in a folder given, without loading it."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.modalities import modality_names
from nnunetv2_mstkd.nnunet.folders import nnunet_folder
from nnunetv2_mstkd.nnunet.safe_plans import find_class


def find_dataset_folder(variable: str, dataset: str) -> Path:
    """The folder of a data set, given by number or full name, below one of nnU-Net's three folders.

    Raises
    ------
    FileNotFoundError, ValueError
        naming what was looked for and where.
    """
    root = nnunet_folder(variable)
    if dataset.startswith("Dataset"):
        folders = [root / dataset] if (root / dataset).is_dir() else []
        wanted = dataset
    elif dataset.isdigit():
        wanted = f"Dataset{int(dataset):03d}_*"
        folders = sorted(path for path in root.glob(wanted) if path.is_dir())
    else:
        raise InputError(f"data set {dataset!r} is neither a number nor a name such as Dataset226_BraTS")
    if not folders:
        raise MissingFileError(f"no folder {wanted} in {root} ({variable})")
    if len(folders) > 1:
        listed = ", ".join(path.name for path in folders)
        raise InputError(f"data set {dataset} is ambiguous in {root}: {listed}; give the full name")
    return folders[0]


def find_model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """nnU-Net's folder of a trained model.

    Raises
    ------
    FileNotFoundError
        naming the folder that was looked for and the models that are there.
    """
    results = find_dataset_folder("nnUNet_results", dataset)
    folder = results / f"{trainer}__{plans}__{configuration}"
    if not folder.is_dir():
        there = ", ".join(path.name for path in sorted(results.glob("*__*__*")) if path.is_dir()) or "none"
        raise MissingFileError(
            f"no trained model {folder}; models of {results.name} (-tr TRAINER -p PLANS -c CONFIGURATION) are: {there}"
        )
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a model or data set; FileNotFoundError or ValueError names it."""
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist, so {file.parent} is no complete model or data set folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no table, expected nnU-Net's {file.name}")
    return content


def parse_folds(texts: Sequence[str | int]) -> tuple[int | str, ...]:
    """Folds as given after ``-f``: numbers, or ``all``."""
    wrong = [str(text) for text in texts if str(text) != "all" and not str(text).isdigit()]
    if wrong:
        raise InputError(f"-f {' '.join(wrong)}: expected fold numbers such as 0 1 2, or all")
    return tuple(text if text == "all" else int(text) for text in texts)


def find_checkpoints(folder: Path, folds: Sequence[int | str], checkpoint: str) -> list[Path]:
    """The checkpoint file of each fold.

    Raises
    ------
    FileNotFoundError
        naming the missing files and what is there instead.
    """
    files = [folder / f"fold_{fold}" / checkpoint for fold in folds]
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return files
    listed = ", ".join(str(file.relative_to(folder)) for file in missing)
    there = [file.parent.name.removeprefix("fold_") for file in sorted(folder.glob(f"fold_*/{checkpoint}"))]
    others = [str(file.relative_to(folder)) for file in sorted(folder.glob("fold_*/checkpoint_*.pth"))]
    if there:
        hint = f"that checkpoint is there for: -f {' '.join(there)}"
    elif others:
        hint = f"the training is not finished; there are {', '.join(others)}. Take one with -chk NAME -f FOLD"
    else:
        hint = "the folder holds no checkpoint at all"
    raise MissingFileError(f"{listed} not found in {folder}; {hint}")


def find_format(dataset: str | None, model: Path | None) -> tuple[dict[str, Any], type[BaseReaderWriter]]:
    """dataset.json of a data set or a model, and nnU-Net's reader of its images.

    Parameters
    ----------
    dataset:
        number or name; looked for below nnUNet_preprocessed, nnUNet_raw and nnUNet_results.
    model:
        folder of a trained model, instead.

    Raises
    ------
    FileNotFoundError, ValueError
        naming what was looked for.
    """
    if model is not None:
        plans_file = model / "plans.json"
        dataset_json = check_description(read_json(model / "dataset.json"), str(model / "dataset.json"))
        return dataset_json, _reader(read_json(plans_file).get("image_reader_writer"), str(plans_file))
    folders, problems = [], []
    for variable in ("nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results"):
        try:
            folder = find_dataset_folder(variable, str(dataset))
        except FileNotFoundError as error:
            problems.append(str(error))
            continue
        folders += [folder, *sorted(folder.glob("*__*__*"))]
    described = [folder for folder in folders if (folder / "dataset.json").is_file()]
    if not described:
        where = "; ".join(problems) if not folders else f"none in {', '.join(map(str, folders))}"
        raise MissingFileError(f"no dataset.json of data set {dataset}: {where}")
    description = described[0] / "dataset.json"
    dataset_json = check_description(read_json(description), str(description))
    for folder in folders:  # the planner looked into the images to choose a reader; their ending alone says less
        for file in sorted(folder.glob("*.json")):
            with contextlib.suppress(ValueError):
                name = read_json(file).get("image_reader_writer")
                if name is not None:
                    return dataset_json, _reader(name, str(file))
    name = dataset_json.get("overwrite_image_reader_writer", "None")
    with contextlib.suppress(ValueError):  # as nnU-Net, which then goes by the ending
        return dataset_json, _reader(name, str(description))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return dataset_json, determine_reader_writer_from_file_ending(dataset_json["file_ending"], verbose=False)
    except RuntimeError as error:
        ending = dataset_json["file_ending"]
        raise InputError(f"nnU-Net has no image reader for {ending!r}, the file_ending in {description}") from error


def _reader(name: Any, source: str) -> type[BaseReaderWriter]:
    return find_class("image_reader_writer", name, source)


def check_description(dataset_json: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a dataset.json after a look at what every command reads from it.

    Raises
    ------
    ValueError
        naming the entry that is missing or impossible; a file ending that would lead into another folder is.
    """
    for key in ("labels", "file_ending"):
        if key not in dataset_json:
            raise InputError(f"{source} has no {key}, so it is no complete dataset.json of nnU-Net v2")
    ending = dataset_json["file_ending"]
    if not isinstance(ending, str) or not re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending):
        raise InputError(f"file_ending in {source} is {ending!r}, expected an ending such as .nii.gz")
    if not isinstance(dataset_json["labels"], dict):
        raise InputError(f"labels in {source} is no table of names and values")
    modality_names(dataset_json)
    return dataset_json
