"""``mstkd path``: the folder for ``export nnUNet_extTrainer=$(mstkd path)``."""

from __future__ import annotations

import argparse

from nnunetv2_mstkd.nnunet.registration import TRAINER_PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no arguments; say when the folder is needed."""
    parser.epilog = (
        "The installation registers this folder whenever Python starts. If that is switched off (MSTKD_AUTOLOAD=0) or "
        "start-up files are not allowed, register it with: export nnUNet_extTrainer=$(mstkd path)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the folder."""
    print(TRAINER_PATH)
