"""`mstkd restore-labels`: predictions with the label values and file names of the release."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunetv2_mstkd.errors import MissingFileError

EXIT_LEFT_OUT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd restore-labels`."""
    from nnunetv2_mstkd.dataset_conversion.releases import RELEASES

    parser.description = (
        "Convert predictions for a data set of `mstkd convert` back to the release's own label values and file names. "
        "Each written file is read back and compared. The mapping comes from the dataset.json that prediction copies "
        "into its output folder."
    )
    add = parser.add_argument
    add("-i", metavar="PREDICTIONS", type=Path, required=True, help="folder of segmentations; it is only read")
    add("-o", metavar="OUT", type=Path, required=True, help="output folder, created if necessary")
    add("-d", metavar="ID", help="number or name of the data set, if PREDICTIONS has no dataset.json")
    add(
        "--release", metavar="RELEASE", choices=sorted(RELEASES),
        help=f"write the values of another release, matching classes by name: {', '.join(RELEASES)}",
    )  # fmt: skip
    add(
        "--min-et", metavar="VOXELS", type=int,
        help="an enhancing tumor of fewer voxels becomes another class (see documentation/datasets/brats.md)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Restore all predictions; exit code 1 if some were left out, which are listed."""
    from nnunetv2_mstkd.dataset_conversion.restoring import restoration, restore_folder
    from nnunetv2_mstkd.images.atomic import read_json
    from nnunetv2_mstkd.nnunet.description import check_description
    from nnunetv2_mstkd.nnunet.folders import find_dataset_folder, refuse_same_folder

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
    ending = check_description(dataset_json, str(file))["file_ending"]
    restored, problems = restore_folder(args.i, args.o, how, ending=ending, min_enhancing=args.min_et)
    print(f"{restored} segmentations restored (values changed: {how.changes}): {args.o}")
    if problems:
        print(f"{len(problems)} left out:\n  " + "\n  ".join(problems), file=sys.stderr)
        return EXIT_LEFT_OUT
    return 0
