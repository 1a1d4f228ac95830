"""Atomic writes: readers see the old file or the complete new one, never part of it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunetv2_mstkd.errors import ExistingFileError, InputError, MissingFileError, UserError, WriteError


def read_json(file: Path, missing: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object; ``missing`` is added to the message if there is no such file."""
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist{missing}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no table, expected a JSON object")
    return content


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces ``target`` when the block ends; after an error it is removed.

    It is in the same folder, because a file cannot be renamed into another file system. Its name is drawn at random,
    which keeps two writers apart: the processes of two containers may have the same number. A file of ``tempfile``
    would be readable by its owner only.

    Raises
    ------
    WriteError
        If the block or the replacement meets an error of the file system, such as a full disk.
    """
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield scratch
        os.replace(scratch, target)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise WriteError(f"{target} could not be written ({reason}); what was there before is untouched") from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def clear_scratch(folder: Path, names: str) -> None:
    """Remove what killed processes left of files whose name matches the pattern ``names``."""
    for leftover in folder.glob(f".{names}.*.part"):
        leftover.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_write(file) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")


def write_json(file: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file atomically; on one line if ``indent`` is None."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


@contextmanager
def locked(file: Path, busy: str | None = None) -> Iterator[None]:
    """Let one process at a time work on a file, which has a hidden one beside it meanwhile.

    The lock of a process that was killed is free again. On a file system that refuses locks, none is used.

    Parameters
    ----------
    busy
        Message of the InputError if another process holds the lock; None: wait until it is free.
    """
    lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=-1 if busy is None else 0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(busy) from None
    except (NotImplementedError, OSError):
        pass  # as on some network mounts
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # whoever waits for it notices
        lock.release()


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``target``, which is removed when the block ends.

    A folder that a killed process left is emptied first.
    """
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write to, which becomes ``target``, a new folder; after an error it is removed.

    If ``target`` is an empty folder, the files are moved into it one by one when all are complete: it may be a mount
    point or the working directory, which cannot be replaced.
    """
    target = target.resolve()
    inside = target / "unfinished"
    leftover = f".{inside.name}.part"  # of a killed process
    if target.exists() and (not target.is_dir() or any(each.name != leftover for each in target.iterdir())):
        raise ExistingFileError(f"{target} is not empty; choose a new folder")
    with scratch_folder(inside if target.exists() else target) as scratch:
        yield scratch
        if target.exists():
            for file in sorted(scratch.iterdir()):
                file.rename(target / file.name)
        else:
            scratch.rename(target)


def replace_folder(target: Path, new: Path) -> None:
    """Move a complete folder to the place of ``target``; what was there is kept until then, and after an error."""
    old = new.with_name(f"{new.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:  # also an interrupt
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def complete_image(path: Path) -> Iterator[None]:
    """Raise WriteError if part of the image that the block writes to ``path`` is missing.

    On a full disk ITK silently writes what fits of a NIfTI or small NRRD file. The readers of formats other than NIfTI
    notice what is missing. Put the file into a scratch folder, or rename it after the block.
    """
    # these bring SimpleITK, which most users of this module do not need
    from nnunetv2_mstkd.images.completeness import NIFTI_ENDINGS, check_complete
    from nnunetv2_mstkd.images.geometry import last_line, read_image

    try:
        yield
    except RuntimeError as error:
        if not re.search("itk(::)? ?error", str(error), re.IGNORECASE):
            raise
        raise _incomplete(path, last_line(error)) from error
    try:
        check_complete(path)
        if not path.name.lower().endswith(NIFTI_ENDINGS):
            read_image(path)
    except ValueError as error:
        raise _incomplete(path, error) from error


def _incomplete(path: Path, reason: object) -> WriteError:
    return WriteError(f"{path} could not be written completely ({reason}); is the disk full?")
