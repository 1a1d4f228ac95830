"""Names that come out of a file and are about to become part of a path."""

from __future__ import annotations

from typing import Any

from nnunetv2_mstkd.errors import InputError


def check_file_name(name: Any, what: str) -> str:
    """Return ``name`` if it is the name of one file or folder and leads nowhere else.

    Parameters
    ----------
    name:
        as a file has it.
    what:
        what it is and where it stands, for the message: ``data_identifier in plans.json``.

    Raises
    ------
    ValueError
        if it is no text, is empty, or would leave the folder that it is put into.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise InputError(f"{what} is {name!r}, expected the name of one file or folder, without / and \\")
    return name
