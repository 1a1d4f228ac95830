"""`mstkd status`: how far a cross-validation is."""

from __future__ import annotations

import argparse

from nnunetv2_mstkd.commands.crossval import add_plan_arguments, planned_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd status`: which steps, as for `mstkd crossval`."""
    parser.description = (
        "Show the state of each step of a cross-validation: done, running (with the current epoch), queued behind "
        "others, stopped, or waiting to be started. This is read from nnU-Net's own logs and results, so training "
        "runs that were started by hand count, too."
    )
    add_plan_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print a line for each step."""
    from nnunetv2_mstkd.crossval.overview import overview

    print(overview(planned_steps(args)))
