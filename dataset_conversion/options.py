"""The command line of all converters: the same options for each release, as a sub-command or as a script."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunetv2_mstkd.dataset_conversion import splits as folds
from nnunetv2_mstkd.dataset_conversion.checks import LEVELS, MAX_OUTSIDE
from nnunetv2_mstkd.dataset_conversion.conversion import convert, dataset_name
from nnunetv2_mstkd.dataset_conversion.description import Description
from nnunetv2_mstkd.dataset_conversion.job import DEFAULT_WORKERS, Options, Report, count, problem_lines
from nnunetv2_mstkd.dataset_conversion.releases import RELEASES
from nnunetv2_mstkd.dataset_conversion.writing import COPY, LINK, REFERENCE
from nnunetv2_mstkd.errors import run_and_report

EXIT_SKIPPED = 1
"""The data set was written without some cases."""


def add_common_arguments(parser: argparse.ArgumentParser, *, name: str | None = None) -> None:
    """Add the options that every converter has; `name` is the default for the data set's own."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the data set; it is only read")
    parser.add_argument("-d", "--dataset-id", metavar="ID", type=int, required=True, help="number of the new data set")
    shown = f" (default: {name})" if name else ""
    parser.add_argument("--name", required=name is None, default=name, help=f"its name: DatasetID_NAME{shown}")
    how = parser.add_mutually_exclusive_group()
    for mode, text in (
        (COPY, "copy the files (default)"),
        (LINK, "symbolic links; files that must change are written"),
        (REFERENCE, "leave the files, and name their paths in dataset.json; files that must change are written"),
    ):
        how.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default=COPY, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a data set, and folds, of that name")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=DEFAULT_WORKERS, help="cases at a time (default: %(default)s)"
    )

    checks = parser.add_argument_group(
        "checks", "A case with a problem is left out and listed; then the exit code is 1."
    )
    checks.add_argument(
        "--verify",
        choices=LEVELS,
        help="full: read every file; header: beginnings and ends only (default: full, but header if all is "
        "converted already)",
    )
    checks.add_argument("--strict", action="store_true", help="write nothing if any case has a problem")
    checks.add_argument(
        "--allow-missing",
        action="store_true",
        help="keep cases without some of the modalities: zero images take their place, and they are listed",
    )
    checks.add_argument(
        "--max-outside",
        metavar="SHARE",
        type=float,
        default=MAX_OUTSIDE,
        help="share of a label that may lie where all images are zero (default: %(default)s)",
    )
    checks.add_argument("--follow-links", action="store_true", help="accept links to files outside SOURCE")

    group = parser.add_argument_group(
        "folds and test cases", "Cases of one patient stay together. The folds go to nnUNet_preprocessed."
    )
    group.add_argument(
        "--folds", metavar="N", type=int, help="number of folds (default: 5, or one per patient if fewer)"
    )
    group.add_argument(
        "--val-cases", metavar="CASE", nargs="+", default=[], help="one fold that validates on these cases"
    )
    group.add_argument(
        "--splits",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="published splits: train.txt val.txt test.txt (train1.txt ... for several folds), a .csv table with the "
        "columns case and part, or a splits_final.json",
    )
    group.add_argument("--no-splits", action="store_true", help="leave the folds to nnU-Net")
    group.add_argument("--test-cases", metavar="CASE", nargs="+", help="cases, or patterns of cases, not to train on")
    group.add_argument(
        "--test-fraction",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="draw this share of the patients as test cases",
    )
    group.add_argument("--unlabelled-as-test", action="store_true", help="take cases without a label as test cases")
    group.add_argument(
        "--seed", type=int, default=folds.SEED, help="of folds and test cases (default: %(default)s, as nnU-Net)"
    )


def add_release_arguments(parser: argparse.ArgumentParser, release: str) -> None:
    """Add the options of a release's converter."""
    add_common_arguments(parser, name=RELEASES[release].title.split(" (")[0].replace(" ", ""))
    parser.add_argument(
        "--labels", action="store_true", help="classes that exclude one another, in place of overlapping regions"
    )
    parser.set_defaults(release=release)


def run_release(args: argparse.Namespace) -> int:
    """Convert a release as its options say; return the exit code."""
    description = RELEASES[args.release].description(plain_labels=args.labels)
    return run_conversion(args, description)


def run_conversion(args: argparse.Namespace, description: Description) -> int:
    """Convert as the options of :func:`add_common_arguments` say, and print what was written and what comes next.

    Raises
    ------
    ValueError, FileNotFoundError, FileExistsError
        As :func:`nnunetv2_mstkd.dataset_conversion.conversion.convert` does.
    """
    if args.test_cases:
        description = replace(description, test_cases=args.test_cases)
    options = Options(
        mode=args.mode,
        verify=args.verify,
        allow_missing=args.allow_missing,
        strict=args.strict,
        unlabelled_as_test=args.unlabelled_as_test,
        follow_links=args.follow_links,
        max_outside=args.max_outside,
        test_fraction=args.test_fraction,
        seed=args.seed,
        folds=args.folds,
        val_cases=args.val_cases,
        split_lists=args.splits,
        write_splits=not args.no_splits,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    report = convert(args.source, description, dataset_name(args.dataset_id, args.name), options)
    for line in summary(report, description):
        print(line)
    print(f"next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} --verify_dataset_integrity")
    if not report.skipped:
        return 0
    lines = "\n  ".join(problem_lines(report.skipped))
    print(f"{count(report.skipped, 'case')} left out:\n  {lines}", file=sys.stderr)
    return EXIT_SKIPPED


def summary(report: Report, description: Description) -> list[str]:
    """What to tell the user of a conversion."""
    training = [case for case in report.cases if case.part == "Tr"]
    patients = {case.patient for case in training}
    of = f" of {count(sorted(patients), 'patient')}" if len(patients) < len(training) else ""
    was = ", already complete" if report.was_finished else ""
    was = f", {count(range(report.resumed), 'case')} from an interrupted run" if report.resumed else was
    lines = [
        f"{report.folder}: {count(training, 'training case')}{of}, "
        f"{count(range(len(report.cases) - len(training)), 'test case')}, "
        f"channels {', '.join(description.modalities)}{was}"
    ]
    if report.splits_file is not None:
        lines.append(f"{report.splits_file}: the folds")
    for note, cases in sorted(report.notes.items()):
        some = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
        lines.append(f"note: {note}" + (f" ({count(cases, 'case')}: {some})" if cases else ""))
    return lines


def main(release: str, argv: Sequence[str] | None = None) -> int:
    """Run the converter of one release as a script and return its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"{release}.py", description=f"Convert {RELEASES[release].title} into nnU-Net's raw format."
    )
    add_release_arguments(parser, release)
    return run_and_report(f"{release}.py", run_release, parser.parse_args(argv))
