"""Any data set with one folder per case, described by a small file or by options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.dataset_conversion.description import BACKGROUND, Description, read_description
from nnunetv2_mstkd.dataset_conversion.modality_names import canonical_modality
from nnunetv2_mstkd.dataset_conversion.options import add_common_arguments, run_conversion
from nnunetv2_mstkd.errors import InputError, run_and_report

EXAMPLE = """\
example of a description:
  {
    "modalities": {"T1": "T1.nii.gz", "T1ce": "T1POST.nii.gz", "T2": "T2.nii.gz", "FLAIR": "FLAIR.nii.gz"},
    "label": "GOLD_STANDARD.nii.gz",
    "labels": {"background": 0, "lesion": 1}
  }
{case} in a pattern is the name of the case, a list of patterns means alternatives. Further keys: regions_class_order,
cases, test_cases and patient, as the options of these names; remap, from the files' own label values to those to write:
{"4": 3}

example of a call:
  %(prog)s SOURCE -d 501 --name OpenMS --description open_ms.json --val-cases patient26
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    add_common_arguments(parser)
    group = parser.add_argument_group(
        "what the data set holds",
        "A file, or options, or both: an option replaces the key of that meaning in the file.",
    )
    group.add_argument("--description", metavar="FILE", type=Path, help="JSON or YAML file; see the example below")
    group.add_argument(
        "--modality",
        metavar="NAME=PATTERN",
        action="append",
        help="a channel and the pattern of its file in the case folder; repeat it in the order of the channels",
    )
    group.add_argument("--label", metavar="PATTERN", help="pattern of the label file in the case folder")
    group.add_argument(
        "--class",
        dest="classes",
        metavar="NAME=VALUE[,VALUE...]",
        action="append",
        help="a label and its value, or a region and its values; repeat it (background=0 is understood)",
    )
    group.add_argument(
        "--regions-class-order", metavar="VALUE,VALUE...", help="with regions: the value each one writes"
    )
    group.add_argument("--cases", metavar="PATTERN", help="pattern of the case folders within SOURCE (default: '*')")
    group.add_argument(
        "--patient",
        metavar="EXPRESSION",
        help="regular expression whose group is the patient in the name of a case: '(.*)-[0-9]+'; without it each case "
        "is a patient",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Convert the data set that the options describe; return the exit code."""
    given = described(args)
    description = Description.from_mapping(given)
    for name in given["modalities"]:
        if canonical_modality(name) != name:
            print(f"note: {name} is called {canonical_modality(name)} in the data set, as in those of the releases")
    return run_conversion(args, description)


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of the description file, each replaced by the option of its meaning where that was given.

    Raises
    ------
    ValueError
        If an option is not of its form.
    """
    options: dict[str, Any] = {"label": args.label, "cases": args.cases, "patient": args.patient}
    if args.modality:
        options["modalities"] = dict(_pairs("--modality", args.modality, "NAME=PATTERN"))
    if args.classes:
        classes = _pairs("--class", args.classes, "NAME=VALUE")
        options["labels"] = {BACKGROUND: 0} | {name: _label_values("--class", values) for name, values in classes}
    if args.regions_class_order:
        values = _label_values("--regions-class-order", args.regions_class_order)
        options["regions_class_order"] = values if isinstance(values, list) else [values]
    if not args.description and not any(value is not None for value in options.values()):
        raise InputError("nothing describes the data set; give --description FILE, or --modality, --label and --class")
    from_file = read_description(args.description) if args.description else {}
    return from_file | {key: value for key, value in options.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run this converter alone and return its exit code."""
    parser = argparse.ArgumentParser(prog="generic.py", description="Write a data set in nnU-Net's raw format.")
    add_arguments(parser)
    return run_and_report("generic.py", run, parser.parse_args(argv))


def _pairs(option: str, given: Sequence[str], form: str) -> list[tuple[str, str]]:
    pairs = [(name.strip(), value) for name, _, value in (item.partition("=") for item in given)]
    for item, (name, value) in zip(given, pairs, strict=True):
        if not name or not value:
            raise InputError(f"{option} is {item!r}, expected {form}")
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{option} names {twice[0]} twice")
    return pairs


def _label_values(option: str, text: str) -> int | list[int]:
    try:
        values = [int(value) for value in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} has the value {text!r}, expected integers, separated by commas") from error
    return values if len(values) > 1 else values[0]


if __name__ == "__main__":
    sys.exit(main())
