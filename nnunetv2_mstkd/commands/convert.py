"""``mstkd convert``: turn a data set into nnU-Net's raw format."""

from __future__ import annotations

import argparse

from nnunetv2_mstkd.dataset_conversion import generic
from nnunetv2_mstkd.dataset_conversion.options import add_release_arguments, run_release
from nnunetv2_mstkd.dataset_conversion.releases import RELEASES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each release, and one for all other data."""
    subparsers = parser.add_subparsers(dest="converter", metavar="RELEASE", required=True)
    for name, release in RELEASES.items():
        subparser = subparsers.add_parser(
            name, help=release.title, description=f"Convert {release.title} into nnU-Net's raw format."
        )
        add_release_arguments(subparser, name)
        subparser.set_defaults(run_converter=run_release)
    line = "any data set with one folder per case"
    subparser = subparsers.add_parser("generic", help=line, description=f"Convert {line} into nnU-Net's raw format.")
    generic.add_arguments(subparser)
    subparser.set_defaults(run_converter=generic.run)


def run(args: argparse.Namespace) -> int:
    """Run the converter asked for."""
    return args.run_converter(args)
