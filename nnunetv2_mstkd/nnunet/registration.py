"""Tell nnU-Net where this package's trainers are.

nnU-Net >= 2.8 looks for ``-tr NAME`` in its own package and then in each folder of the environment variable
``nnUNet_extTrainer``. :func:`register` appends :data:`TRAINER_PATH` to that variable. ``nnunetv2_mstkd.pth``, which the
installation puts beside the package, calls :func:`autoload` at interpreter start, in nnU-Net's worker processes too.

This module runs in every Python process of the environment: it imports nothing but ``os``, which the interpreter has
already loaded, and it cannot raise.
"""

import os

EXTERNAL_TRAINERS = "nnUNet_extTrainer"
AUTOLOAD = "MSTKD_AUTOLOAD"

TRAINER_PATH = os.path.join(os.path.dirname(__file__), "_trainer_path")
"""The folder for nnU-Net to search. It holds one module that imports the trainers from the installed package: nnU-Net
imports what it finds there as a top-level module and forgets it again: a class *defined* there could not be pickled."""


def external_folders() -> list[str]:
    """The folders of ``nnUNet_extTrainer``, in nnU-Net's order."""
    return [folder for folder in os.environ.get(EXTERNAL_TRAINERS, "").split(os.pathsep) if folder]


def register() -> None:
    """Append :data:`TRAINER_PATH` to ``nnUNet_extTrainer``. Idempotent; what the user set stays, and comes first."""
    folders = external_folders()
    if TRAINER_PATH not in folders:
        os.environ[EXTERNAL_TRAINERS] = os.pathsep.join([*folders, TRAINER_PATH])


def autoload() -> None:
    """Call :func:`register` unless the user switched the automatic call off with ``MSTKD_AUTOLOAD=0``."""
    if os.environ.get(AUTOLOAD, "1").strip().lower() not in ("0", "false", "f", "no", "off"):
        register()
