"""Writing one checked case into a data set: bytes as they are where that is possible, else as compressed NIfTI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import SimpleITK as sitk

from nnunetv2_mstkd.dataset_conversion.cases import Case
from nnunetv2_mstkd.dataset_conversion.checks import Checked, label_values
from nnunetv2_mstkd.dataset_conversion.description import FILE_ENDING, Description
from nnunetv2_mstkd.images.completeness import written_whole
from nnunetv2_mstkd.images.geometry import Geometry, read_image

COPY, LINK, REFERENCE = "copy", "link", "reference"


class Written(NamedTuple):
    """Where the files of one case are: relative to the data set, or absolute paths of the source."""

    images: list[str]
    label: str | None


def write_case(case: Case, checked: Checked, description: Description, folder: Path, mode: str) -> Written:
    """Write the files of one case that passed its check.

    Parameters
    ----------
    case, checked, description
        The case and what is known of it.
    folder
        The data set, with its sub-folders.
    mode
        ``"copy"``; ``"link"`` for symbolic links; ``"reference"`` to leave training files where they are. A file that
        cannot be used as it is gets written in every mode, and an absent modality becomes a zero image. Test cases have
        no place in nnU-Net's table of references and are linked.

    Raises
    ------
    ValueError
        If a file has become unreadable since it was checked.
    """
    assert checked.geometry is not None
    part = "Ts" if case.is_test else "Tr"
    if case.is_test and mode == REFERENCE:
        mode = LINK
    images = []
    stack: tuple[Path, sitk.Image] | None = None
    for channel, (path, absent) in enumerate(zip(case.images, checked.absent, strict=True)):
        name = f"images{part}/{case.name}_{channel:04d}{FILE_ENDING}"
        if absent or path is None:
            empty = sitk.Image(list(checked.geometry.size), sitk.sitkUInt8)
            _write(empty, checked.geometry, folder / name)
        elif path in checked.as_is:
            name = _place(path, folder, name, mode)
        elif description.stack:
            if stack is None:
                stack = path, read_image(path)
            volume = list(description.modalities)[channel]
            _write(_volume(stack[1], description.stack.index(volume)), checked.geometry, folder / name)
        else:
            _write(read_image(path), checked.geometry, folder / name)
        images.append(name)
    label = None
    if case.label is not None:
        label = f"labels{part}/{case.name}{FILE_ENDING}"
        if case.label in checked.as_is:
            label = _place(case.label, folder, label, mode)
        else:
            if checked.label is not None:
                values = checked.label.voxels()
            else:
                values = label_values(sitk.GetArrayFromImage(read_image(case.label)), description)
            _write(sitk.GetImageFromArray(values), checked.geometry, folder / label)
    return Written(images, label)


def _place(source: Path, folder: Path, name: str, mode: str) -> str:
    """Copy or link a file to `name` in the data set, or leave it; return where it is then."""
    if mode == REFERENCE:
        return str(source.absolute())
    target = folder / name
    target.unlink(missing_ok=True)  # what an interrupted run left
    if mode == LINK:
        target.symlink_to(source.absolute())
    else:
        shutil.copyfile(source, target)
    return name


def _volume(image: sitk.Image, index: int) -> sitk.Image:
    size = list(image.GetSize())
    size[3] = 0
    return sitk.Extract(image, size, [0, 0, 0, index])


def _write(image: sitk.Image, geometry: Geometry, target: Path) -> None:
    """Write an image with the case's own geometry: nnU-Net allows less rounding between files than this project."""
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    unfinished = target.with_name(f".{target.name}")
    with written_whole(unfinished):
        sitk.WriteImage(image, str(unfinished), useCompression=True, imageIO="NiftiImageIO")
    os.replace(unfinished, target)
