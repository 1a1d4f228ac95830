"""The folders that nnU-Net's environment variables name."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2_mstkd.errors import MissingFileError


def nnunet_folder(variable: str) -> Path:
    """Return the folder that an environment variable of nnU-Net names.

    Raises
    ------
    FileNotFoundError
        If the variable is not set or the folder is not there.
    """
    folder = os.environ.get(variable)
    if not folder:
        raise MissingFileError(f"{variable} is not set; nnU-Net needs it too: export {variable}=FOLDER")
    if not Path(folder).is_dir():
        raise MissingFileError(f"{variable} is {folder}, which is no folder; make it, or set another one")
    return Path(folder)
