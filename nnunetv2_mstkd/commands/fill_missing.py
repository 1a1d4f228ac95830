"""`mstkd fill-missing`: write zero images for absent modalities, for stock nnUNetv2_predict."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.commands.predict import add_input, add_model, refuse_same_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd fill-missing`."""
    parser.description = (
        "Copy an input folder and write a zero image, with the geometry of one that is there, for every absent "
        "CASE_000k file. nnUNetv2_predict on the result gives what mstkd predict gives on the input, but for the "
        "exceptions in documentation/prediction.md."
    )
    add_input(parser)
    parser.add_argument("-o", metavar="OUT", type=Path, required=True, help="new folder; appears when it is complete")
    add_model(parser)
    parser.add_argument("--link", action="store_true", help="symbolic links instead of copies of the images")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for jobs without a terminal")


def run(args: argparse.Namespace) -> int:
    """Check all cases and write the good ones; exit code 1 if some were skipped."""
    from nnunetv2_mstkd import modalities
    from nnunetv2_mstkd.inference.checks import Checker
    from nnunetv2_mstkd.inference.selection import select
    from nnunetv2_mstkd.inference.zero_filling import fill_folder
    from nnunetv2_mstkd.nnunet.model_folder import find_format

    refuse_same_folder(args.o, args.i, "input folder")
    dataset_json, reader = find_format(args.d, args.m)
    names = modalities.modality_names(dataset_json)
    progress = not args.disable_progress_bar
    selection = select(
        args.i,
        dataset_json["file_ending"],
        Checker(names, reader),
        drop=args.drop,
        skip_bad=args.skip_bad,
        threads=2,
        progress=progress,
        verb="written",
    )
    written = fill_folder(
        selection.cases, args.o, reader, dataset_json["file_ending"], link=args.link, progress=progress
    )
    print(f"{len(selection.cases)} cases with {len(names)} channels, {written} of them zero images: {args.o}")
    return selection.report()
