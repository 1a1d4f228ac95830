"""`mstkd restore-labels`: predictions with the label values and file names of the release."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_mstkd.errors import InputError, MissingFileError

if TYPE_CHECKING:
    import numpy as np

    from nnunetv2_mstkd.dataset_conversion.restoring import Restoration

EXIT_LEFT_OUT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd restore-labels`."""
    from nnunetv2_mstkd.dataset_conversion.releases import RELEASES

    parser.description = (
        "Turn predictions for a data set of `mstkd convert` back into the release's own label values and file names. "
        "Each file is read back and compared. The mapping comes from the dataset.json that prediction copies into its "
        "output folder."
    )
    parser.add_argument(
        "-i", metavar="PREDICTIONS", type=Path, required=True, help="folder of segmentations; only read"
    )
    parser.add_argument("-o", metavar="OUT", type=Path, required=True, help="output folder, made if absent")
    parser.add_argument("-d", metavar="ID", help="data set, if PREDICTIONS has no dataset.json")
    parser.add_argument(
        "--release", choices=sorted(RELEASES), help="write another release's values; classes are matched by name"
    )
    parser.add_argument(
        "--min-et",
        metavar="VOXELS",
        type=int,
        help="post-processing: an enhancing tumor of fewer voxels becomes the class that the release's table names",
    )


def run(args: argparse.Namespace) -> int:
    """Restore all predictions; exit code 1 if some could not be, which are listed."""
    from nnunetv2_mstkd.commands.predict import refuse_same_folder
    from nnunetv2_mstkd.dataset_conversion.restoring import restoration, restore_file
    from nnunetv2_mstkd.nnunet.model_folder import check_description, find_dataset_folder, read_json

    if not args.i.is_dir():
        raise MissingFileError(f"no folder {args.i}")
    refuse_same_folder(args.o, args.i, "folder of predictions")
    file = args.i / "dataset.json"
    if args.d is not None:
        file = find_dataset_folder("nnUNet_raw", args.d) / "dataset.json"
    elif not file.is_file():
        raise MissingFileError(f"{args.i} has no dataset.json; name the data set: -d ID")
    dataset_json = read_json(file)
    how = restoration(dataset_json, args.release)
    check_description(dataset_json, str(file))
    change = _post_processing(how, args.min_et)
    ending = dataset_json["file_ending"]
    predictions = [path for path in sorted(args.i.glob(f"*{ending}")) if not path.name.startswith(".")]
    if not predictions:
        raise MissingFileError(f"no segmentation *{ending} in {args.i}")
    args.o.mkdir(parents=True, exist_ok=True)
    problems = []
    for path in predictions:
        target = args.o / how.label_file.replace("{case}", path.name.removesuffix(ending))
        try:
            restore_file(path, target, how, change)
        except ValueError as error:
            problems.append(f"{path.name} {error}")
    changed = ", ".join(f"{value} -> {own}" for value, own in how.values.items() if value != own) or "none"
    print(f"{len(predictions) - len(problems)} segmentations restored (values changed: {changed}): {args.o}")
    if problems:
        print(f"{len(problems)} left out:\n  " + "\n  ".join(problems), file=sys.stderr)
        return EXIT_LEFT_OUT
    return 0


def _post_processing(how: Restoration, min_et: int | None) -> Callable[[np.ndarray], np.ndarray] | None:
    if min_et is None:
        return None
    from nnunetv2_mstkd.metrics.postprocessing import relabel_small_region

    if how.enhancing is None or how.small_et_becomes is None:
        raise InputError("--min-et: the data set has no class ET, or its table names none to take its place")
    return partial(relabel_small_region, labels=how.enhancing, replacement=how.small_et_becomes, min_voxels=min_et)
