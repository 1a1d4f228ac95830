"""The console commands of this very Python environment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def command_path(name: str) -> str:
    """The path of a command that was installed with this package, before any other one on the PATH.

    Raises
    ------
    FileNotFoundError
        if there is none.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; pip install nnunetv2 nnunetv2_mstkd")
    return found
