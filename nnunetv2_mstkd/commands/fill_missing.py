"""`mstkd fill-missing`: write zero images for absent modalities, for stock nnUNetv2_predict."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.commands import model_options as options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd fill-missing`."""
    parser.description = (
        "Copy an input folder and write a zero image for every absent CASE_000k file, with the geometry of the case's "
        "other images. nnUNetv2_predict on the result gives the same as mstkd predict on the input, with the "
        "exceptions in documentation/prediction.md."
    )
    options.add_input(parser)
    options.add_case_selection(parser)
    parser.add_argument("-o", metavar="OUT", type=Path, required=True, help="new folder; appears when it is complete")
    options.add_dataset_or_model(parser)
    parser.add_argument("--link", action="store_true", help="link the images instead of copying them")
    options.add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Check all cases and write the good ones; exit code 1 if some were skipped."""
    from nnunetv2_mstkd.inference.zero_filling import fill_missing

    result = fill_missing(
        args.i,
        args.o,
        dataset=args.d,
        model=args.m,
        drop=args.drop,
        skip_bad=args.skip_bad,
        link=args.link,
        progress=not args.disable_progress_bar,
    )
    print(f"{len(result.cases)} cases with {result.channels} channels, {result.zeros} of them zero images: {args.o}")
    return options.report_left_out(result.problems)
