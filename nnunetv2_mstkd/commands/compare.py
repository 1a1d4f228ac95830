"""`mstkd compare`: compare evaluated models case by case."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.errors import ExistingFileError
from nnunetv2_mstkd.evaluation.files import FOLDER, RESULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd compare`."""
    parser.description = (
        "Compare two or more models that `mstkd evaluate` has measured: paired differences case by case over all "
        "subsets of modalities, by number of modalities and by subset, with Wilcoxon tests (Holm's correction), "
        "intervals over resampled patients, and a ranking with its stability."
    )
    parser.add_argument(
        "models",
        metavar="[NAME=]PATH",
        nargs="+",
        help=f"model folders, their folders {FOLDER}, or files {RESULTS}; NAME is what a model is called here",
    )
    parser.add_argument(
        *("-o", "--output"),
        metavar="OUT",
        type=Path,
        default=Path("comparison"),
        help="output folder, made if absent (default: ./%(default)s)",
    )
    parser.add_argument(
        "--metrics",
        metavar="METRIC",
        nargs="+",
        default=("dice",),
        help="by these (default: dice); the figure: the first",
    )
    parser.add_argument("--baseline", metavar="NAME", help="compare all others with it (default: each with each)")


def run(args: argparse.Namespace) -> None:
    """Compare, write and print."""
    if args.output.exists() and not args.output.is_dir():
        raise ExistingFileError(f"the output folder {args.output} is a file")
    # after the checks: these import pandas and scipy
    from nnunetv2_mstkd.reporting.comparison_report import write_comparison
    from nnunetv2_mstkd.statistics.comparison import Comparison, read_evaluations

    comparison = Comparison(
        read_evaluations(args.models),
        metrics=tuple(dict.fromkeys(args.metrics)),
        baseline=args.baseline,
    )
    print(write_comparison(comparison, args.output))
    print(f"\nwritten to {args.output}")
