"""`mstkd compare`: compare evaluated models case by case."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.evaluation_files import COMPARISON, FOLDER, RESULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd compare`."""
    parser.description = (
        "Compare two or more models that `mstkd evaluate` has evaluated: paired differences case by case over all "
        "subsets of modalities, by number of modalities and by subset, with Wilcoxon tests (Holm's correction), "
        "intervals over resampled patients, and a ranking with its stability. These are about the trained networks; to "
        "compare methods, give several training runs of each, with the name repeated: A=SEED0 A=SEED1 A=SEED2 "
        "B=SEED0 B=SEED1 B=SEED2. Intervals then include the variation between training runs, the difference of each "
        "pair of runs is shown, and there are no p-values. Equal numbers of runs are paired in the order given."
    )
    parser.add_argument(
        "models",
        metavar="[NAME=]PATH",
        nargs="+",
        help=f"model folder, its folder {FOLDER}, or a file {RESULTS}; NAME is the model's name in the comparison; "
        "repeat it for each training of a method",
    )
    add = parser.add_argument
    output = "output folder, created if necessary (default: ./%(default)s)"
    add("-o", "--output", metavar="OUT", type=Path, default=Path("comparison"), help=output)
    metrics = "metrics to compare by (default: dice); the figure shows the first"
    add("--metrics", metavar="METRIC", nargs="+", default=("dice",), help=metrics)
    hours = "hours of training, for example of teacher and student together (default: those of the model alone)"
    add("--hours", metavar="NAME=H", nargs="+", default=(), help=hours)
    cases = "cases in the figure with pictures (default: the median case)"
    add("--show-cases", metavar="CASE", nargs="+", default=(), help=cases)
    subsets = "subsets in that figure (default: the worst of each number of modalities)"
    add("--show-subsets", metavar="T1+FLAIR", nargs="+", default=(), help=subsets)
    add("--baseline", metavar="NAME", help="compare all other models with this one (default: compare all pairs)")


def run(args: argparse.Namespace) -> None:
    """Compare, write and print."""
    from nnunetv2_mstkd.reporting.compare import compare

    hours = dict(map(_name_and_hours, args.hours))
    comparison = compare(
        args.models,
        metrics=args.metrics,
        baseline=args.baseline,
        hours=hours,
        show_cases=args.show_cases,
        show_subsets=args.show_subsets,
        output=args.output,
    )
    print(f"{comparison.text}\n\nwritten to {args.output}; open {COMPARISON} in a browser")


def _name_and_hours(text: str) -> tuple[str, float]:
    name, _, hours = text.rpartition("=")
    try:
        if name and float(hours) >= 0:
            return name, float(hours)
    except ValueError:
        pass
    raise InputError(f"--hours {text} is not NAME=HOURS, such as --hours A=12.5")
