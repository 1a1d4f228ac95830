"""Write one checked case into a data set: the files themselves where possible, otherwise as compressed NIfTI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.images.atomic import complete_image
from nnunetv2_mstkd.images.geometry import Geometry, read_image

from .cases import Case
from .checks import Checked, label_values
from .description import FILE_ENDING, IGNORE, Description
from .slices import read_slices

COPY, LINK, REFERENCE = "copy", "link", "reference"


class Written(NamedTuple):
    """Paths of the files of one case: relative to the data set, or absolute in the source."""

    images: list[str]
    label: str | None


def write_case(case: Case, checked: Checked, description: Description, folder: Path, mode: str) -> Written:
    """Write the files of one case that passed its check.

    Parameters
    ----------
    folder
        The data set, with its sub-folders.
    mode
        ``"copy"``; ``"link"`` for symbolic links; ``"reference"`` to leave training files where they are. A file that
        must change is written in every mode, an absent modality becomes a zero image, and an unlabelled case gets a
        label that is ``ignore`` everywhere. Test cases have no place in nnU-Net's table of references and are linked.
    """
    assert checked.geometry is not None
    if case.is_test and mode == REFERENCE:
        mode = LINK
    images = []
    stack: sitk.Image | None = None
    for channel, (path, absent) in enumerate(zip(case.images, checked.absent, strict=True)):
        name = f"images{case.part}/{case.name}_{channel:04d}{FILE_ENDING}"
        if absent or path is None:
            empty = sitk.Image(list(checked.geometry.size), sitk.sitkUInt8)
            _write(empty, checked.geometry, folder / name)
        elif path in checked.as_is:
            name = _place(path, folder, name, mode)
        elif description.stack:
            stack = stack or _read_stack(path, description)
            volume = description.stack.index(list(description.modalities)[channel])
            _write(_volume(stack, volume), checked.geometry, folder / name)
        else:
            _write(read_image(path), checked.geometry, folder / name)
        images.append(name)
    if case.label is None and case.is_test:
        return Written(images, None)
    name = f"labels{case.part}/{case.name}{FILE_ENDING}"
    if case.label is None or checked.unlabelled:  # whose label may have background where an image has a hole of zeros
        values = np.full(checked.geometry.size[::-1], description.labels[IGNORE], np.uint8)
    elif case.label in checked.as_is:
        return Written(images, _place(case.label, folder, name, mode))
    elif checked.label is not None:
        values = checked.label.voxels()
    else:
        values = label_values(sitk.GetArrayFromImage(read_image(case.label)), description)
    _write(sitk.GetImageFromArray(values), checked.geometry, folder / name)
    return Written(images, name)


def _place(source: Path, folder: Path, name: str, mode: str) -> str:
    """Copy or link a file to `name` in the data set, or leave it; return its path then."""
    if mode == REFERENCE:
        return str(source.absolute())
    target = folder / name
    target.unlink(missing_ok=True)  # a leftover of an interrupted run
    if mode == LINK:
        target.symlink_to(source.absolute())
    else:
        shutil.copyfile(source, target)
    return name


def _read_stack(path: Path, description: Description) -> sitk.Image:
    if description.slices is None:
        return read_image(path)
    images = read_slices(path, description).images
    assert images is not None  # they passed the check
    return images


def _volume(image: sitk.Image, index: int) -> sitk.Image:
    size = list(image.GetSize())
    size[3] = 0
    return sitk.Extract(image, size, [0, 0, 0, index])


def _write(image: sitk.Image, geometry: Geometry, target: Path) -> None:
    """Write an image with the geometry of the case: nnU-Net tolerates less rounding between files than this project."""
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    unfinished = target.with_name(f".{target.name}")
    with complete_image(unfinished):
        sitk.WriteImage(image, str(unfinished), useCompression=True, imageIO="NiftiImageIO")
    os.replace(unfinished, target)
