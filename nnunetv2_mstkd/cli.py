"""The command ``mstkd``: a table of sub-commands, of which only the one asked for is imported.

A sub-command lives in ``nnunetv2_mstkd/commands/NAME.py`` (dashes become underscores) and has two functions,
``add_arguments(parser)`` and ``run(args) -> int | None``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import nnunetv2_mstkd
from nnunetv2_mstkd.errors import run_and_report

COMMANDS = {
    "demo": "run the whole method on a small synthetic data set",
    "phantom": "make a synthetic data set with four modalities",
    "predict": "segment cases whose modalities are partly absent",
    "evaluate": "measure a model on all subsets of its modalities",
    "compare": "compare evaluated models case by case",
    "crossval": "train, evaluate and compare over the folds, here or on a cluster",
    "status": "show how far a cross-validation is",
    "fill-missing": "write zero images for absent modalities, for nnUNetv2_predict",
    "configure": "write the settings of a training into a new configuration of the plans",
    "convert": "turn a data set into nnU-Net's raw format",
    "restore-labels": "turn predictions back into a release's label values and file names",
    "path": "print the folder in which nnU-Net finds the trainers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mstkd`` with the arguments `argv` (default: those of the process) and return its exit code."""
    args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    return run_and_report(f"mstkd {args.command}", args.run, args)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for `argv`; of the sub-commands only the one asked for is imported."""
    parser = argparse.ArgumentParser(
        prog="mstkd", description="Missing-modality segmentation for nnU-Net v2.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {nnunetv2_mstkd.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="NAME", required=True)
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, line in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name == asked:
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            module = importlib.import_module(f"nnunetv2_mstkd.commands.{name.replace('-', '_')}")
            subparser.set_defaults(run=module.run)
            module.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
