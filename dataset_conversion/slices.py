"""Cases that are folders of 2-D slices: TIFF files with all channels in one, and one mask per slice."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import tifffile

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.images.geometry import last_line

from .description import Description, alternatives

SLICE = "{slice}"
"""In the name of a file: the number of its slice, from 1."""

SLICE_ENDINGS = (".tif", ".tiff")


class SliceFiles(NamedTuple):
    """Files of a case by the number of their slice, and a line for each thing that is wrong with their names."""

    images: dict[int, Path]
    masks: dict[int, Path]
    problems: list[str]


class SliceVolumes(NamedTuple):
    """Content of a case, and a line for each thing that is wrong with it; images and masks are None then."""

    images: sitk.Image | None  # of four dimensions, the last one for the channels in the order of Description.stack
    masks: sitk.Image | None  # with the release's values; also None if there are none
    copies: dict[str, str]  # absent channels, zero in `images`, and the one that each repeats in the files
    problems: list[str]


def slice_files(folder: Path) -> list[Path]:
    """All TIFF files of a folder, by name."""
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in files if path.name.lower().endswith(SLICE_ENDINGS))


def find_slices(folder: Path, description: Description) -> SliceFiles:
    """Sort the files of a case, which is named like its folder, by the numbers in their names."""
    patterns = [next(iter(description.modalities.values())), description.label]
    image, mask = (alternatives(pattern)[0].replace("{case}", folder.name) for pattern in patterns)
    by_number: dict[str, dict[int, list[Path]]] = {image: defaultdict(list), mask: defaultdict(list)}
    problems = []
    for path in slice_files(folder):
        for pattern, found in by_number.items():
            if match := re.fullmatch(re.escape(pattern).replace(re.escape(SLICE), r"(\d+)"), path.name, re.ASCII):
                found[int(match[1])].append(path)
                break
        else:
            expected = " and ".join(pattern.replace(SLICE, "1") for pattern in by_number)
            problems.append(f"{path.name} is not a slice, expected names such as {expected}")
    for found in by_number.values():
        problems += [
            f"{' and '.join(path.name for path in paths)} are one slice, expected one file"
            for _, paths in sorted(found.items())
            if len(paths) > 1
        ]
    images, masks = ({number: paths[0] for number, paths in sorted(found.items())} for found in by_number.values())
    if not images:
        return SliceFiles({}, masks, [*problems, f"it has no image: no file matches {image!r}"])
    last = max(images)
    if gaps := set(range(1, last + 1)) - set(images):
        problems.append(f"{_numbered('slice', gaps)}: no image, expected slices 1 to {last}")
    if beyond := set(images) - set(range(1, last + 1)):
        problems.append(f"{_numbered('slice', beyond)}: expected numbers from 1")
    if unmasked := set(images) - set(masks) if masks else set():
        problems.append(f"{_numbered('slice', unmasked)}: no mask")
    if alone := set(masks) - set(images) - gaps:
        problems.append(f"{_numbered('mask', alone)}: no image")
    return SliceFiles(images, masks, problems)


def read_slices(folder: Path, description: Description) -> SliceVolumes:
    """Read the slices of a case, whose files :func:`find_slices` found to be complete, in the order of their numbers.

    A channel that repeats the one that the release puts in place of absent sequences, in every slice, is absent. In
    some slices only, it is a problem. Slices in which both are zero tell nothing.
    """
    files, channels, slices = find_slices(folder, description), list(description.stack), description.slices
    assert slices is not None
    faults: dict[tuple[str, str], list[int]] = defaultdict(list)  # by kind of file and fault
    arrays: dict[str, list[np.ndarray]] = {"slice": [], "mask": []}
    size: tuple[int, ...] = ()
    for kind, paths in (("slice", files.images), ("mask", files.masks)):
        for number, path in paths.items():
            try:
                array = _read(path)
                _check_form(array, () if kind == "mask" else (len(channels),))
                size = size or array.shape[:2]
                if array.shape[:2] != size:
                    found, wanted = (f"{width} x {height}" for height, width in (array.shape[:2], size))
                    raise InputError(f"{found} pixels, expected {wanted} as in the others")
                if kind == "mask":
                    _check_values(array, description.value_map)
                arrays[kind].append(array)
            except InputError as error:
                faults[kind, str(error)].append(number)
    problems = [f"{_numbered(kind, numbers)}: {text}" for (kind, text), numbers in faults.items()]
    copies: dict[str, str] = {}
    if not problems:
        volumes = dict(zip(channels, np.moveaxis(np.stack(arrays["slice"]), -1, 0), strict=True))
        copies, problems = _copies(volumes, slices.substitute)
    if problems:
        return SliceVolumes(None, None, copies, problems)
    images = np.stack([np.zeros_like(volume) if name in copies else volume for name, volume in volumes.items()])
    masks = _image(np.stack(arrays["mask"]), slices.spacing) if files.masks else None
    return SliceVolumes(_image(images, (*slices.spacing, 1.0)), masks, copies, [])


def write_masks(values: np.ndarray, target: Path) -> None:
    """Write a segmentation, uint8 of shape (z, y, x), as one file per slice and read each back to compare.

    Parameters
    ----------
    values
        Values to write.
    target
        Path of the files, with :data:`SLICE` in its name. Its folder is created if necessary.
    """
    if values.ndim != 3:
        raise InputError(f"has {values.ndim} dimensions, expected 3: slices, rows, columns")
    target.parent.mkdir(exist_ok=True)
    for number, mask in enumerate(values, start=1):
        with atomic_write(target.with_name(target.name.replace(SLICE, str(number)))) as scratch:
            tifffile.imwrite(scratch, mask, photometric="minisblack", metadata=None)
            if not np.array_equal(_read(scratch), mask):
                raise InputError(f"is not the same when slice {number} is read again")


def _read(path: Path) -> np.ndarray:
    try:
        return tifffile.imread(path)
    except Exception as error:  # of many kinds for a damaged file
        raise InputError(f"{path.name} cannot be read: {last_line(error)}") from error


def _check_form(array: np.ndarray, channels: tuple[int, ...]) -> None:
    if array.ndim < 2 or array.shape[2:] != channels or array.dtype != np.uint8:
        found, wanted = (" x ".join(map(str, shape)) for shape in (array.shape, ("height", "width", *channels)))
        raise InputError(f"{found} values of {array.dtype}, expected {wanted} of uint8")


def _check_values(mask: np.ndarray, allowed: Iterable[int]) -> None:
    strange = sorted(set(np.unique(mask).tolist()) - set(allowed))
    if strange:
        raise InputError(f"it holds {', '.join(map(str, strange))}, expected {' and '.join(map(str, allowed))}")


def _copies(channels: Mapping[str, np.ndarray], substitute: str) -> tuple[dict[str, str], list[str]]:
    """The channels that repeat the substitute in all slices, and a line for each that does so in some."""
    original, copies, problems = channels[substitute], {}, []
    empty = ~original.any(axis=(1, 2))
    for name, volume in channels.items():
        equal = (volume == original).all(axis=(1, 2))
        number = np.count_nonzero(equal & ~empty)
        if name == substitute or not number:
            continue
        if equal.all():
            copies[name] = substitute
        else:
            problems.append(f"{name} equals {substitute} in {number} of {len(equal)} slices, expected all or none")
    return copies, problems


def _image(array: np.ndarray, spacing: Iterable[float]) -> sitk.Image:
    image = sitk.GetImageFromArray(array, isVector=False)
    image.SetSpacing([*spacing])
    return image


def _numbered(noun: str, numbers: Iterable[int]) -> str:
    """A noun with numbers: ``slices 3, 7``."""
    them = sorted(numbers)
    return f"{noun}{'s' * (len(them) > 1)} {', '.join(map(str, them[:10]))}{', ...' * (len(them) > 10)}"
