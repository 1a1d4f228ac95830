"""``mstkd convert``: turn a data set into nnU-Net's raw format."""

from __future__ import annotations

import argparse

from nnunetv2_mstkd.dataset_conversion import generic

CONVERTERS = {
    "generic": (generic, "any data set with one folder per case"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each converter."""
    subparsers = parser.add_subparsers(dest="converter", metavar="DATASET", required=True)
    for name, (module, line) in CONVERTERS.items():
        module.add_arguments(
            subparsers.add_parser(name, help=line, description=f"Convert {line} into nnU-Net's raw format.")
        )


def run(args: argparse.Namespace) -> None:
    """Run the converter asked for."""
    CONVERTERS[args.converter][0].run(args)
