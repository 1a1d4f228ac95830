"""``mstkd path``: the folder for ``export nnUNet_extTrainer=$(mstkd path)``."""

from __future__ import annotations

import argparse

from nnunetv2_mstkd.nnunet.registration import TRAINER_PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no arguments; say when the folder is needed."""
    parser.epilog = (
        "The installation registers this folder at every start of Python. Where that is off (MSTKD_AUTOLOAD=0), "
        "or files that run at start are not allowed: export nnUNet_extTrainer=$(mstkd path)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the folder."""
    print(TRAINER_PATH)
