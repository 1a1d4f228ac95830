"""What was read from the cases of a data set, kept in a file beside their preprocessed data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nnunetv2_mstkd.errors import MissingFileError, WriteError
from nnunetv2_mstkd.images.atomic import read_json, write_json

FORMAT = 1

T = TypeVar("T")


def kept_by_case(
    file: Path,
    folder: Path,
    cases: Sequence[str],
    *,
    read: Callable[[list[str]], Iterable[T]],
    encode: Callable[[T], Any],
    decode: Callable[[Any], T],
    log: Callable[[str], None],
    made_with: Any = None,
    readable: bool = True,
) -> dict[str, T]:
    """Return a value for each case, read again only where its preprocessed file has changed.

    Parameters
    ----------
    file
        Where the values are kept. A file that is damaged, of another format or made with something else is ignored.
    folder
        Preprocessed data of one configuration.
    cases
        Names of the cases.
    read
        Reads the values of some cases, in their order.
    encode, decode
        From a value to what JSON can hold, and back.
    log
        Gets a line if the file cannot be written.
    made_with
        What the values depend on besides the cases, as JSON can hold it.
    readable
        Whether cases can be read. If not, kept values are used although the files have other times, as after a copy.

    Raises
    ------
    MissingFileError
        For a case without preprocessed data.
    """
    stamps = {case: _stamp(folder, case) for case in cases}
    known = _read(file, made_with, decode)
    unread = [case for case in cases if case not in known or known[case][0] != stamps[case]]
    if unread and not readable and known.keys() >= set(unread):
        log(f"{file.name} is used as it is, although the preprocessed data have other times than it noted")
    elif unread:
        known |= {case: (stamps[case], value) for case, value in zip(unread, read(unread), strict=True)}
        content = {case: {"stamp": stamp, "value": encode(value)} for case, (stamp, value) in sorted(known.items())}
        try:
            write_json(file, {"format": FORMAT, "made_with": made_with, "cases": content}, indent=1)
        except WriteError as error:
            log(f"the cases are read again next time: {error}")
    return {case: known[case][1] for case in cases}


def _stamp(folder: Path, case: str) -> list[int]:
    """What tells a preprocessed case from one that replaces it."""
    for ending in (".b2nd", ".npz"):
        path = folder / f"{case}{ending}"
        if path.is_file():
            return [path.stat().st_size, path.stat().st_mtime_ns]
    raise MissingFileError(f"no preprocessed data of case {case} in {folder}; preprocess the data set again")


def _read(file: Path, made_with: Any, decode: Callable[[Any], T]) -> dict[str, tuple[list[int], T]]:
    """Kept values with their stamps; none if the file is not what is expected: it is only a cache."""
    try:
        content = read_json(file)
        fits = content["format"] == FORMAT and content["made_with"] == made_with
        entries = content["cases"].items() if fits else ()
        return {case: (entry["stamp"], decode(entry["value"])) for case, entry in entries}
    except (ValueError, OSError, KeyError, TypeError, AttributeError, IndexError):
        return {}
