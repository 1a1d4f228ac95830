"""Finding the files of every case and checking them, before anything is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.dataset_conversion.completeness import check_complete
from nnunetv2_mstkd.dataset_conversion.description import Description
from nnunetv2_mstkd.dataset_conversion.geometry import Geometry, read_geometry, read_image


@dataclass(frozen=True)
class Case:
    """The files of one case: images in the order of the channels, and the label file (None for some test cases)."""

    name: str
    images: tuple[Path, ...]
    label: Path | None
    is_test: bool


def find_cases(source: Path, description: Description) -> tuple[list[Case], list[str]]:
    """Find the files of all cases.

    Parameters
    ----------
    source
        The folder of the data set.
    description
        What it should hold.

    Returns
    -------
    The cases whose files were all found, by name, and a line for each file that was not.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it has no case folder, a name occurs twice, a test case is not there, or none is left for training.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}")
    folders = sorted(
        (folder for folder in source.glob(description.cases) if folder.is_dir() and not folder.name.startswith(".")),
        key=lambda folder: folder.name,
    )
    if not folders:
        raise ValueError(f"no folder in {source} matches {description.cases!r}, expected one folder per case")
    twice = [name for name, count in Counter(folder.name for folder in folders).items() if count > 1]
    if twice:
        raise ValueError(f"several case folders in {source} are named {', '.join(twice)}, expected distinct names")
    for pattern in description.test_cases:
        if not any(fnmatchcase(folder.name, pattern) for folder in folders):
            raise ValueError(f"no case folder in {source} matches the test case {pattern!r}")
    if all(description.is_test_case(folder.name) for folder in folders):
        raise ValueError(f"all {len(folders)} cases in {source} are test cases, expected at least one to train on")

    cases, problems = [], []
    for folder in folders:
        case, missing = _find_case(folder, description)
        problems += [f"{folder.name}: {problem}" for problem in missing]
        if not missing:
            cases.append(case)
    return cases, problems


def check_case(case: Case, description: Description) -> list[str]:
    """Return a line for each file of `case` that nnU-Net would trip over, or silently misread."""
    files = dict(zip(description.modalities, case.images, strict=True))
    if case.label is not None:
        files["label"] = case.label
    geometries: dict[str, Geometry] = {}
    problems = []
    for name, path in files.items():
        try:
            geometry = read_geometry(path)
            not_finite = check_complete(path)
            if not_finite:
                problems.append(f"{name} ({path.name}) has {not_finite} voxels that are NaN or infinite")
            geometries[name] = geometry
        except ValueError as error:
            problems.append(f"{name} ({path.name}) {error}")
    if geometries:
        first, reference = next(iter(geometries.items()))
        for name, geometry in geometries.items():
            problems += [
                f"{name} has {difference} as in {first}; resample it to the same grid"
                for difference in reference.differences(geometry)
            ]
    if "label" in geometries:
        try:
            read_label(files["label"], description)
        except ValueError as error:
            problems.append(f"label ({files['label'].name}) {error}")
    return [f"{case.name}: {problem}" for problem in problems]


def read_label(path: Path, description: Description) -> np.ndarray:
    """Read a label file.

    Parameters
    ----------
    path
        The file, of any pixel type.
    description
        Declares the values, after its ``remap``.

    Returns
    -------
    Array of uint8, axes in the reverse order of the image's (z, y, x).

    Raises
    ------
    ValueError
        If a value is no integer or not declared.
    """
    stored = sitk.GetArrayFromImage(read_image(path))
    if np.issubdtype(stored.dtype, np.floating):
        whole = np.isfinite(stored) & (stored == np.rint(stored))
        if not whole.all():
            raise ValueError(f"holds {stored[~whole][0]:g}, expected integers only")
    written = np.zeros(stored.shape, dtype=np.uint8)
    undeclared = []
    for value in map(int, np.unique(stored)):
        meaning = description.remap.get(value, value)
        if meaning in description.declared_values:
            written[stored == value] = meaning
        else:
            undeclared.append(value)
    if undeclared:
        raise ValueError(
            f"holds the undeclared values {undeclared}, declared are {sorted(description.declared_values)}"
        )
    return written


def _find_case(folder: Path, description: Description) -> tuple[Case, list[str]]:
    """Return the case in `folder`, and a line for each of its files that is missing or ambiguous."""
    is_test = description.is_test_case(folder.name)
    found: dict[str, Path] = {}
    problems = []
    for name, pattern in {**description.modalities, "label": description.label}.items():
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(files) == 1:
            found[name] = files[0]
        elif files:
            problems.append(f"{name}: {', '.join(path.name for path in files)} match {pattern!r}, expected one file")
        elif not (is_test and name == "label"):
            problems.append(f"{name}: no file matches {pattern!r}")
    by_file: dict[Path, list[str]] = {}
    for name, path in found.items():
        by_file.setdefault(path, []).append(name)
    problems += [f"{' and '.join(names)} are the same file {path.name}" for path, names in by_file.items() if names[1:]]
    images = tuple(found[name] for name in description.modalities if name in found)
    return Case(folder.name, images, found.get("label"), is_test), problems
