"""nnU-Net's folders and the names in them: data sets, models, folds and checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import ExistingFileError, InputError, MissingFileError
from nnunetv2_mstkd.images.names import utf8_name

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
CHECKPOINTS = (FINAL, LATEST, BEST)
"""File names of checkpoints, in the order in which nnU-Net's ``--c`` looks for one to continue from."""


# ---- folders -------------------------------------------------------------------------------------------------------


def nnunet_folder(variable: str) -> Path:
    """Return the folder that an environment variable of nnU-Net names; MissingFileError if there is none."""
    folder = os.environ.get(variable)
    if not folder:
        raise MissingFileError(f"{variable} is not set; nnU-Net needs it too: export {variable}=FOLDER")
    if not Path(folder).is_dir():
        raise MissingFileError(f"{variable} is {folder}, which is not a folder; create it, or set another one")
    return Path(folder)


def find_raw_folder(dataset: str) -> Path | None:
    """Return the folder of a data set below nnUNet_raw, by its full name; None if it does not exist."""
    folder = Path(os.environ.get("nnUNet_raw") or os.devnull, check_file_name(dataset, "the data set"))
    return folder if (folder / "dataset.json").is_file() else None


def names_of_number(number: int) -> list[str]:
    """Return the names of all data sets with a number, in any of nnU-Net's folders; nnU-Net refuses more than one."""
    roots = [Path(os.environ[variable]) for variable in VARIABLES if os.environ.get(variable)]
    found = {path.name for root in roots for path in root.glob(f"Dataset{number:03d}_*") if path.is_dir()}
    return sorted(found)


def find_dataset_folder(variable: str, dataset: str) -> Path:
    """Find the folder of a data set, a number or full name, below an environment variable such as ``nnUNet_raw``."""
    root = nnunet_folder(variable)
    if dataset.isdecimal():
        wanted, names = f"Dataset{int(dataset):03d}_*", names_of_number(int(dataset))
        if len(names) > 1:
            raise InputError(
                f"data set {dataset} is ambiguous in nnU-Net's folders: {', '.join(names)}; give the full name"
            )
        folders = [root / name for name in names if (root / name).is_dir()]
    elif dataset.startswith("Dataset"):
        wanted = check_file_name(dataset, "the data set")
        folders = [root / dataset] if (root / dataset).is_dir() else []
    else:
        raise InputError(f"data set {dataset!r} is neither a number nor a name such as Dataset226_BraTS")
    if not folders:
        raise MissingFileError(f"no folder {wanted} in {root} ({variable})")
    return folders[0]


def dataset_number(name: str) -> int:
    """Return 226 for ``Dataset226_BraTS``."""
    match = re.match(r"Dataset(\d+)_", name)
    if match is None:
        raise InputError(f"{name!r} is not the name of a data set, expected one such as Dataset226_BraTS")
    return int(match[1])


def dataset_argument(name: str) -> str:
    """Return how commands name a data set: by its number, or by its name if another one has the same number."""
    number = dataset_number(name)
    return str(number) if set(names_of_number(number)) <= {name} else name


def model_folder_name(trainer: str, plans: str, configuration: str) -> str:
    """Return nnU-Net's name for the results of a trainer, plans and a configuration."""
    return f"{trainer}__{plans}__{configuration}"


def find_model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """Find a trained model below nnUNet_results; MissingFileError lists the models that exist."""
    results = find_dataset_folder("nnUNet_results", dataset)
    folder = results / model_folder_name(trainer, plans, configuration)
    if not folder.is_dir():
        trained = {path.parents[1].name for path in results.glob("*__*__*/fold_*/checkpoint_*.pth")}
        found = ", ".join(sorted(trained)) or "none"
        raise MissingFileError(
            f"no trained model {folder}; models of {results.name} (-tr TRAINER -p PLANS -c CONFIGURATION) are: {found}"
        )
    return folder


def refuse_same_folder(output: Path, other: Path, what: str) -> None:
    """Refuse an output folder that is a file, or ``other``, which must not change (``what``: ``"input folder"``).

    One whose name is not UTF-8 is refused as well: SimpleITK cannot write there.
    """
    utf8_name(output, "written")
    if output.exists() and not output.is_dir():
        raise ExistingFileError(f"the output folder {output} is a file; choose another one")
    if output.resolve() == other.resolve() or (output.exists() and other.exists() and output.samefile(other)):
        raise InputError(f"the output folder {output} is the {what}; choose another one")


# ---- folds and checkpoints -----------------------------------------------------------------------------------------


def parse_folds(texts: Sequence[str | int]) -> tuple[int | str, ...]:
    """Read folds as given after ``-f``: numbers, or ``all``, each once."""
    wrong = [str(text) for text in texts if str(text) != "all" and not str(text).isdecimal()]
    if wrong:
        raise InputError(f"-f {' '.join(wrong)}: expected fold numbers such as 0 1 2, or all")
    return tuple(dict.fromkeys(text if text == "all" else int(text) for text in texts))


def trained_folds(folder: Path, checkpoint: str = FINAL) -> tuple[int | str, ...]:
    """Return the numbers of all folds of a model that have a checkpoint of this name; MissingFileError if none has.

    Fold ``all`` is not among them: it has seen every case, so it is only used where it is asked for.
    """
    names = [path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")]
    folds = sorted(int(name) for name in names if name.isdecimal())
    if not folds:
        hint = "fold_all is: -f all" if "all" in names else "train one, or take another checkpoint with -chk"
        raise MissingFileError(f"no fold of {folder} is finished (no fold_*/{checkpoint}); {hint}")
    return tuple(folds)


def find_checkpoints(folder: Path, folds: Sequence[int | str], checkpoint: str = FINAL) -> list[Path]:
    """Return the checkpoint file of each fold; MissingFileError says what exists instead."""
    files = [folder / f"fold_{fold}" / checkpoint for fold in folds]
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return files
    found = [file.parent.name.removeprefix("fold_") for file in sorted(folder.glob(f"fold_*/{checkpoint}"))]
    others = [str(file.relative_to(folder)) for file in sorted(folder.glob("fold_*/checkpoint_*.pth"))]
    if found:
        hint = f"that checkpoint is there for: -f {' '.join(found)}"
    elif others:
        unfinished = "the training is not finished; " if checkpoint == FINAL else ""
        hint = f"{unfinished}found instead: {', '.join(others)}. Take one with -chk NAME -f FOLD"
    elif any(folder.glob("checkpoint_*.pth")):
        hint = f"it is the folder of one fold; name that of the model: -m {folder.parent}"
    else:
        hint = "the folder holds no checkpoint at all"
    raise MissingFileError(
        f"{', '.join(str(file.relative_to(folder)) for file in missing)} not found in {folder}; {hint}"
    )


# ---- names ---------------------------------------------------------------------------------------------------------


def check_file_name(name: Any, what: str) -> str:
    """Return ``name`` if it can safely become part of a path: it names one file or folder.

    Parameters
    ----------
    name
        A value from a file, of any type.
    what
        What it is and where it was found, for the message: ``"data_identifier in plans.json"``.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise InputError(f"{what} is {name!r}, expected the name of one file or folder, without / and \\")
    return name
