"""Files that are at any moment absent, the old or the whole new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_file(target: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``target`` when the block ends; after an error it is removed.

    It lies in the same folder, because a file cannot be renamed into another file system, and its name has the number
    of the process, which keeps two writers apart. A file of ``tempfile`` would be readable for its owner only.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield scratch
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def clear_scratch(folder: Path, names: str) -> None:
    """Remove what processes that were killed left of files whose name matches the pattern ``names``."""
    for leftover in folder.glob(f".{names}.*.part"):
        leftover.unlink(missing_ok=True)
