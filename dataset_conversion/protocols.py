"""Published protocols: which cases of a release train, validate and test.

The lists are in ``protocols/``, one table per protocol, which begins with the repositories and commits of its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_mstkd.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """A row of the table."""

    release: str  # whose cases it divides
    note: str = ""  # what its user has to know


_OVERLAP = (
    "the test sets of rfnet2018-1, -2 and -3 overlap (14 cases in 1 and 2, 9 in 1 and 3, 14 in 2 and 3): the mean over "
    "them is not a cross-validation"
)

PROTOCOLS: Mapping[str, Protocol] = {
    "rfnet2018-1": Protocol("brats2018", _OVERLAP),
    "rfnet2018-2": Protocol("brats2018", _OVERLAP),
    "rfnet2018-3": Protocol("brats2018", _OVERLAP),
    "rfnet2020": Protocol("brats2020"),
    "imfuse2023": Protocol("brats2023_gli"),
}


def protocols_of(release: str) -> list[str]:
    """Return the names of a release's protocols."""
    return [name for name, protocol in PROTOCOLS.items() if protocol.release == release]


def protocol_list(name: str, release: str) -> Path:
    """Return the table with the cases of a protocol; InputError if the release has no such protocol."""
    known = protocols_of(release)
    if name not in known:
        listed = ", ".join(known) or "none"
        raise InputError(f"the protocol is {name!r}, expected one of those of {release or 'the data set'}: {listed}")
    return Path(__file__).parent / "protocols" / f"{name}.csv"
