"""Finding the cases in a folder of nnU-Net inputs, in which any channel's file may be absent."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mstkd.errors import MissingFileError
from nnunetv2_mstkd.images.atomic import read_json

CHANNEL_DIGITS = 4

IMAGE_ENDINGS = (
    ".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".gipl", ".hdr", ".img", ".mgz", ".dcm", ".tif", ".tiff",
    ".png", ".bmp", ".jpg",
)  # fmt: skip
"""A file with one of these was probably meant as an input; notes and sidecars beside the images are no problem."""


@dataclass(frozen=True)
class Case:
    """One case and its images."""

    name: str
    """The case id: CASE of ``CASE_0000.nii.gz``."""
    files: tuple[Path | None, ...]
    """One entry per channel; None where the modality is absent."""
    all_zero: tuple[int, ...] = ()
    """Channels whose file is zero everywhere and so counts as absent."""
    stamps: tuple[str | None, ...] = field(default=(), compare=False)
    """One entry per channel: size and time of the last change of its file, None without one."""

    @property
    def availability(self) -> tuple[bool, ...]:
        """True for each channel that has an image."""
        return tuple(path is not None for path in self.files)

    def without(self, channels: Sequence[int]) -> Case:
        """Return a copy in which these channels are absent."""
        return replace(self, files=tuple(None if c in channels else path for c, path in enumerate(self.files)))


class Problem(NamedTuple):
    """Something that keeps a case, or (case None) a file of the folder, from being predicted as it was meant."""

    case: str | None
    text: str


def find_cases(folder: Path, file_ending: str, names: Sequence[str]) -> tuple[list[Case], list[Problem]]:
    """Sort the files of an input folder into cases.

    Parameters
    ----------
    folder
        Folder of files ``CASE_000k`` + ``file_ending``; any of a case's files may be absent.
    names
        Names of the C channels.

    Returns
    -------
    All cases, sorted by name as nnU-Net sorts them, and what is wrong with files and names.
    """
    if not folder.is_dir():
        raise MissingFileError(f"no input folder {folder}")
    pattern = _image_name(file_ending)
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    problems, strays = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        match = pattern.fullmatch(path.name)
        if match is None:
            strays.append(path)
            continue
        name, channel = match[1], int(match[2])
        files = found[name]  # also without a valid channel: such a case is reported, too
        if channel < len(names):
            files[channel] = path
        else:
            known = ", ".join(f"{number:04d} {text}" for number, text in enumerate(names))
            text = f"has the channel number {channel}; the data set has the {len(names)} channels {known}"
            problems.append(Problem(name, f"{path.name} {text}"))
    problems += [problem for path in strays for problem in _stray(path, file_ending, found)]
    if not found:
        raise MissingFileError(
            f"no input in {folder}: expected files such as CASE_0000{file_ending} with one number per channel "
            f"({', '.join(names)})" + "".join(f"\n  {problem.text}" for problem in problems)
        )
    cases = []
    for name, present in sorted(found.items()):
        paths = tuple(present.get(channel) for channel in range(len(names)))
        cases.append(Case(name, paths, stamps=tuple(None if path is None else file_stamp(path) for path in paths)))
    return cases, problems + _same_names(cases)


def training_cases(raw: Path, channels: int) -> dict[str, Case]:
    """Find the training cases of a data set below nnUNet_raw, by name; each must have so many images.

    These are the cases of nnU-Net's ``get_filenames_of_train_images_and_targets``, which starts twelve processes.
    """
    description = read_json(raw / "dataset.json")
    found: dict[str, list[Path]] = defaultdict(list)
    for name, entry in description.get("dataset", {}).items():
        found[name] = [raw / os.path.expandvars(path) for path in entry["images"]]
    if "dataset" not in description:
        pattern = _image_name(description["file_ending"])
        for path in sorted((raw / "imagesTr").iterdir()):
            if match := pattern.fullmatch(path.name):
                found[match[1]].append(path)
    cases = {}
    for name, images in found.items():
        absent = next((path for path in images if not path.is_file()), None)
        if absent is not None:
            raise MissingFileError(f"the image {absent} of case {name} does not exist")
        if len(images) != channels:
            raise MissingFileError(f"{raw}: case {name} has {len(images)} images, expected {channels}")
        cases[name] = Case(name, tuple(images))
    return cases


class TrainingFiles(NamedTuple):
    """Where a training case of a data set below nnUNet_raw lies."""

    images: tuple[Path, ...]
    label: Path


def training_files(raw: Path, case: str, description: Mapping[str, Any], channels: int) -> TrainingFiles:
    """Return the files of one training case as nnU-Net finds them; MissingFileError names one that does not exist.

    ``description`` is the content of the data set's dataset.json.
    """
    entry, ending = description.get("dataset", {}).get(case), description["file_ending"]
    if entry is None:
        images = [f"imagesTr/{case}_{channel:0{CHANNEL_DIGITS}d}{ending}" for channel in range(channels)]
        entry = {"images": images, "label": f"labelsTr/{case}{ending}"}
    *paths, label = [raw / os.path.expandvars(path) for path in (*entry["images"], entry["label"])]
    absent = next((path for path in (*paths, label) if not path.is_file()), None)
    if absent is not None:
        raise MissingFileError(f"the file {absent} of case {case} does not exist")
    return TrainingFiles(tuple(paths), label)


def file_stamp(path: Path) -> str:
    """What tells a file from one that replaces it, without reading it: size and time of the last change, or ""."""
    try:
        status = path.stat()
        return f"{status.st_size} bytes, {datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat()}"
    except (OSError, OverflowError, ValueError):
        return ""  # reading it says why, unless only its time is beyond the calendar


def _image_name(file_ending: str) -> re.Pattern[str]:
    """The pattern of an image's file name; its groups are the case and the channel number."""
    return re.compile(rf"(.+)_(\d{{{CHANNEL_DIGITS}}}){re.escape(file_ending)}", re.DOTALL)


def _stray(path: Path, file_ending: str, names: Iterable[str]) -> list[Problem]:
    """Report a file that nnU-Net would silently leave out, or cut to a wrong case name.

    It is given to the case of ``names`` that its name begins with: that case may lack this very image.
    """
    own = [name for name in names if path.name.startswith(name) and not path.name[len(name) :][:1].isalnum()]
    owner = max(own, key=len, default=None)
    if path.name.endswith(file_ending):
        expected = f"CASE_0000{file_ending}"
        return [Problem(owner, f"{path.name} has no channel number of four digits, expected a name such as {expected}")]
    begun = re.match(rf"(.+)_\d{{{CHANNEL_DIGITS}}}{re.escape(file_ending)}.+", path.name, re.DOTALL)
    if begun:
        return [Problem(begun[1], f"{path.name} looks like an image that has not arrived in full; wait, or remove it")]
    ending = next((ending for ending in IMAGE_ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None:
        return []
    match = re.fullmatch(rf"(.+)_\d{{{CHANNEL_DIGITS}}}", path.name[: -len(ending)], re.DOTALL)
    text = f"{path.name} does not end in {file_ending}, as dataset.json says the files of this data set do"
    return [Problem(match[1] if match else owner, text)]


def _same_names(cases: Sequence[Case]) -> list[Problem]:
    """Report case ids whose segmentations overwrite one another where file names ignore upper and lower case."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        by_name[case.name.casefold()].append(case.name)
    return [
        Problem(name, f"is a duplicate case id: {' and '.join(names)} differ in upper and lower case only")
        for names in by_name.values()
        if len(names) > 1
        for name in names
    ]
