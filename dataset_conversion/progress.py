"""Records of a conversion: beside an unfinished data set for the next run to resume, in a finished one to verify it."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case
from .checks import HEADER

RECORD = "conversion.json"
SETTINGS, CASES = "settings.json", "cases.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class CaseRecord:
    """One case that was worked on."""

    name: str
    part: str  # "Tr" or "Ts"
    patient: str
    sources: Mapping[str, list[int]]  # its fingerprint
    images: list[str] = field(default_factory=list)  # written files, as in writing.Written
    label: str | None = None
    states: list[list[int]] = field(default_factory=list)  # the file_state of each of `written`
    missing: list[str] = field(default_factory=list)  # modalities that are zero images
    unlabelled: bool = False  # whether it is a training case whose label is 'ignore' in every voxel
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # why it was left out; then nothing was written
    level: str = HEADER  # how closely it was checked; earlier versions did not say

    @property
    def written(self) -> list[str]:
        """All written files: the images, then the label."""
        return [*self.images, *([self.label] if self.label else [])]

    def is_of(self, case: Case, sources: Mapping[str, list[int]]) -> bool:
        """Whether it records this case, made from files of this :func:`fingerprint`."""
        return dict(self.sources) == sources and self.part == case.part

    def damage(self, folder: Path) -> str | None:
        """What has happened to a written file since; None: all are as they were written."""
        paths = [folder / name for name in self.written]  # an absolute path stays as it is
        for path in paths:
            if not path.is_file():
                return f"{path} no longer exists"
        for path, state in zip(paths, self.states, strict=True):
            try:
                same = file_state(path) == state
            except OSError as error:
                return f"{path} cannot be read ({error.strerror})"
            if not same:
                return f"{path} has changed since it was written (size, beginning or end)"
        return None


def fingerprint(case: Case, source: Path) -> dict[str, list[int]]:
    """Size in bytes and time of modification in ns of each file: they tell whether a case must be converted again."""
    files = {str(path.relative_to(source) if path.is_relative_to(source) else path): path for path in case.files}
    return {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}


def file_state(path: Path) -> list[int]:
    """Size of a file and checksum of its ends: the header, and in a ``.nii.gz`` file the checksum of the image."""
    with path.open("rb") as file:
        start = file.read(4096)
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        return [size, zlib.crc32(file.read(), zlib.crc32(start))]


class Progress:
    """The finished cases of an unfinished data set, one line of JSON each; those of other settings are discarded."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._file = folder / CASES
        self._lock = threading.Lock()
        self.done: dict[str, CaseRecord] = {}
        known = folder / SETTINGS
        if known.is_file() and self._file.is_file() and _read(known) == settings:
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    record = CaseRecord(**json.loads(line))
                except (ValueError, TypeError):
                    break  # the line that an interrupted run did not finish
                self.done[record.name] = record
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(settings), encoding="utf-8")
        self._file.write_text("".join(_line(record) for record in self.done.values()), encoding="utf-8")

    def add(self, record: CaseRecord) -> None:
        """Record a case whose files are all written; thread-safe."""
        with self._lock:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(_line(record))
            self.done[record.name] = record


def write_record(
    folder: Path, settings: Mapping[str, Any], written: Iterable[CaseRecord], skipped: Mapping[str, list[str]]
) -> None:
    """Write ``conversion.json`` into a finished data set."""
    cases = [asdict(record) for record in written]
    unlabelled = sum(case["unlabelled"] for case in cases)
    content = {"format": FORMAT, "settings": settings, "unlabelled": unlabelled, "cases": cases, "skipped": {**skipped}}
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, CaseRecord], dict[str, list[str]]] | None:
    """Return settings, cases and skipped cases of a finished data set; None if this package did not write it."""
    content = _read(folder / RECORD)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    cases = [CaseRecord(**entry) for entry in content["cases"]]
    return content["settings"], {case.name: case for case in cases}, content["skipped"]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _line(record: CaseRecord) -> str:
    return json.dumps(asdict(record)) + "\n"
