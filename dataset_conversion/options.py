"""The options of the converters, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.processes import default_workers

from .checks import LEVELS, MAX_OUTSIDE
from .description import BACKGROUND, Description, read_description
from .job import Options
from .protocols import protocols_of
from .releases import RELEASES
from .splits import SEED
from .writing import COPY, LINK, REFERENCE

GENERIC = "generic"
"""The converter for data that are described by a small file or by options."""

GENERIC_TITLE = "any data set with one folder per case"

EXAMPLE = """\
example of a description:
  {
    "modalities": {"T1": "T1.nii.gz", "T1ce": "T1POST.nii.gz", "T2": "T2.nii.gz", "FLAIR": "FLAIR.nii.gz"},
    "label": "GOLD_STANDARD.nii.gz",
    "labels": {"background": 0, "lesion": 1}
  }
{case} in a pattern stands for the name of the case, and a pattern may contain subfolders (anat/{case}_T1.nii.gz); a
list of patterns means alternatives. Further keys: regions_class_order, cases, test_cases and patient, like the options
of these names; remap, from label values in the files to values to write: {"4": 3}

example command:
  %(prog)s SOURCE -d 501 --name OpenMS --description open_ms.json --val-cases patient26
"""


def add_arguments(parser: argparse.ArgumentParser, converter: str) -> None:
    """Add the options of the converter of a release, or of :data:`GENERIC`."""
    if converter == GENERIC:
        _add_common_arguments(parser)
        _add_description_arguments(parser)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = EXAMPLE
    else:
        release = RELEASES[converter]
        name = release.title.split(" (")[0].replace(" ", "")
        _add_common_arguments(parser, name=name, protocols=protocols_of(converter))
        if release.regions:
            text = "train on mutually exclusive classes instead of overlapping regions"
            parser.add_argument("--labels", action="store_true", help=text)
        if release.slices is not None:
            text = "voxel size in mm along x, y and z, which the files do not contain (default: %(default)s)"
            default = release.slices.spacing
            parser.add_argument("--spacing", metavar=("X", "Y", "Z"), nargs=3, type=float, default=default, help=text)
    parser.set_defaults(converter=converter)


def options_of(args: argparse.Namespace) -> Options:
    """How to convert, from the parsed options."""
    names = {field.name for field in fields(Options)}
    return Options(**{name: value for name, value in vars(args).items() if name in names})


def description_of(args: argparse.Namespace) -> tuple[Description, dict[str, str]]:
    """What to convert, from the parsed options, and the modalities that are renamed."""
    if args.converter == GENERIC:
        given = described(args)
        description = Description.from_mapping(given)
        names = zip(given["modalities"], description.modalities, strict=True)
        renamed = {own: name for own, name in names if own != name}
    else:
        release, renamed = RELEASES[args.converter], {}
        description = release.description(plain_labels=bool(release.regions) and args.labels)
        if description.slices is not None:
            slices = replace(description.slices, spacing=tuple(args.spacing))
            description = replace(description, slices=slices)
    return replace(description, test_cases=args.test_cases) if args.test_cases else description, renamed


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of the description file, each replaced by the option of the same meaning if that is given."""
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


# ---- declarations: the names of the arguments are those of Options ---------------------------------------------------


def _add_common_arguments(
    parser: argparse.ArgumentParser, *, name: str | None = None, protocols: Sequence[str] = ()
) -> None:
    """Add the options of every converter; `name` is the default name of the data set."""
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="folder of the data set; it is only read")
    add("-d", "--dataset-id", metavar="ID", type=int, required=True, help="number of the new data set")
    shown = f" (default: {name})" if name else ""
    add("--name", required=name is None, default=name, help=f"name of the new data set, in DatasetID_NAME{shown}")
    how = parser.add_mutually_exclusive_group()
    for mode, text in (
        (COPY, "copy the files (default)"),
        (LINK, "make symbolic links; only files that must change are written"),
        (REFERENCE, "only list the paths of the files in dataset.json; files that must change are written"),
    ):
        how.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default=COPY, help=text)
    add("--overwrite", action="store_true", help="replace a data set of that name, and its folds")
    add("--workers", metavar="N", type=int, default=default_workers(), help="parallel processes (default: %(default)s)")

    purpose = "Cases with problems are left out and listed, and the exit code is 1."
    add = parser.add_argument_group("checks", purpose).add_argument
    add(
        "--verify", choices=LEVELS,
        help="full: read every file; header: beginnings and ends only (default: full, but header if everything is "
        "converted already)",
    )  # fmt: skip
    add("--strict", action="store_true", help="write nothing if any case has a problem")
    add(
        "--allow-missing", action="store_true",
        help="keep cases that lack modalities: zero images replace the missing files, and the cases are listed",
    )  # fmt: skip
    add(
        "--max-outside", metavar="SHARE", type=float, default=MAX_OUTSIDE,
        help="fraction of a label that may lie where all images are zero (default: %(default)s)",
    )  # fmt: skip
    add("--follow-links", action="store_true", help="accept links to files outside SOURCE")

    purpose = "Cases of one patient stay together. The folds go to nnUNet_preprocessed."
    add = parser.add_argument_group("folds and test cases", purpose).add_argument
    add("--folds", metavar="N", type=int, help="number of folds (default: 5, or one per patient if fewer)")
    add("--val-cases", metavar="CASE", nargs="+", default=[], help="make one fold that validates on these cases")
    add(
        "--splits", dest="split_lists", metavar="FILE", type=Path, nargs="+", default=[],
        help="published splits: train.txt val.txt test.txt or .csv with a column case (train1.txt ... for several "
        "folds), one .csv table with the columns case and part, or a splits_final.json",
    )  # fmt: skip
    if protocols:
        add(
            "--protocol", choices=protocols, default="",
            help="published training, validation (fold 0) and test cases, all of which must pass the checks",
        )  # fmt: skip
    add("--no-splits", dest="write_splits", action="store_false", help="let nnU-Net make the folds")
    add("--test-cases", metavar="CASE", nargs="+", help="test cases, or patterns of their names")
    add(
        "--test-fraction",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="draw this share of the patients as test cases",
    )
    add(
        "--unlabelled", action="store_true",
        help="keep training cases without a label, with 'ignore' everywhere, for trainers that learn from them",
    )  # fmt: skip
    add("--unlabelled-as-test", action="store_true", help="use cases without a label as test cases")
    add("--seed", type=int, default=SEED, help="seed for folds and test cases (default: %(default)s, as in nnU-Net)")


def _add_description_arguments(parser: argparse.ArgumentParser) -> None:
    purpose = "Give a file, options, or both: an option overrides the key with the same meaning in the file."
    add = parser.add_argument_group("what the data set holds", purpose).add_argument
    add("--description", metavar="FILE", type=Path, help="JSON or YAML file; see the example below")
    add(
        "--modality", metavar="NAME=PATTERN", action="append",
        help="a channel and the pattern of its file in the case folder; repeat in the order of the channels",
    )  # fmt: skip
    add("--label", metavar="PATTERN", help="pattern of the label file in the case folder")
    add(
        "--class", dest="classes", metavar="NAME=VALUE[,VALUE...]", action="append",
        help="a label and its value, or a region and its values; repeat for each (background=0 is implied)",
    )  # fmt: skip
    add("--regions-class-order", metavar="VALUE,VALUE...", help="with regions: the label value of each")
    add("--cases", metavar="PATTERN", help="pattern of the case folders within SOURCE (default: '*')")
    add(
        "--patient", metavar="EXPRESSION",
        help="regular expression whose group is the patient's part of a case name: '(.*)-[0-9]+' (default: each case "
        "is a patient)",
    )  # fmt: skip
