"""Names of files that other libraries can take."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2_mstkd.errors import InputError


def utf8_name(path: Path, what: str) -> str:
    """The path as text; InputError (``what`` it cannot be: ``"read"``) if it is not UTF-8.

    SimpleITK ends the process with such a name, which old network shares have.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot be {what}: the name {os.fsencode(path)!r} is not UTF-8; rename it") from error
