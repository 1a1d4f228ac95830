"""The grid of an image: reading it from the file header, and comparing two of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.affines import apply_affine, voxel_sizes

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.names import utf8_name

TOLERANCE = 1e-3
"""Largest difference between the files of one case in spacing and origin (mm) and direction cosines: rounding."""


def close(one: Any, other: Any) -> bool:
    """Whether spacings, origins, directions or transformations are equal but for rounding."""
    return np.allclose(one, other, rtol=0, atol=TOLERANCE)


class Forms(NamedTuple):
    """The two transformations of a NIfTI header, shape (4, 4); None if its code says that it is not set."""

    qform: np.ndarray | None
    sform: np.ndarray | None
    size: tuple[int, ...]
    """Voxels per axis."""

    @classmethod
    def of(cls, header: Any) -> Forms:
        """Read a header of nibabel."""
        return cls(
            header.get_qform() if header["qform_code"] > 0 else None,
            header.get_sform() if header["sform_code"] > 0 else None,
            (*header.get_data_shape(), 1, 1, 1)[:3],
        )

    @property
    def preferred(self) -> np.ndarray | None:
        """The one that nibabel and most tools choose. ITK takes the qform if the sform's code is above 1."""
        return self.qform if self.sform is None else self.sform

    @property
    def differ(self) -> bool:
        """Whether both are set and disagree."""
        return self.qform is not None and self.sform is not None and not close(self.qform, self.sform)

    def displaced(self, one: np.ndarray | None, other: np.ndarray | None) -> bool:
        """Whether two transformations, if both are given, put a corner of the image half a voxel or more apart.

        A qform holds its rotation in single precision, and loses small tilts.
        """
        if one is None or other is None:
            return False
        corners = np.array([*itertools.product(*((0, length - 1) for length in self.size))])
        apart = np.linalg.norm(apply_affine(one, corners) - apply_affine(other, corners), axis=1)
        return bool(apart.max() >= voxel_sizes(one).min() / 2)


@dataclass(frozen=True)
class Geometry:
    """The grid of a scalar image; lengths are in mm."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    """Direction cosines of the axes, row by row."""

    def differences(self, other: Geometry) -> list[str]:
        """Name what differs by more than :data:`TOLERANCE`, for example ``spacing (1, 1, 2) instead of (1, 1, 1)``."""
        found: list[str] = []
        if self == other:  # by far the most frequent, and comparing arrays is slow
            return found
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if len(mine) != len(theirs) or not close(theirs, mine):
                found.append(f"{item.name} {short_text(theirs)} instead of {short_text(mine)}")
        return found


def read_geometry(path: Path) -> Geometry:
    """Read the header of an image file; InputError if it is not one scalar image of two or three dimensions."""
    return geometry_of(image_reader(path))


def read_affine(path: Path) -> Geometry:
    """Read the header of a NIfTI file as nibabel understands it: in its axes (RAS), sheared ones too."""
    image: Any = nibabel.load(path)
    if len(image.shape) != 3:
        raise InputError(f"has {len(image.shape)} dimensions, expected one scalar image of 3 dimensions")
    spacing = voxel_sizes(image.affine)
    direction = image.affine[:3, :3] / spacing
    return Geometry(image.shape, tuple(spacing), tuple(image.affine[:3, 3]), tuple(direction.ravel()))


def read_forms(path: Path) -> Forms | None:
    """Read the transformations of a NIfTI file; None for a file of another format."""
    try:
        return Forms.of(nibabel.load(path).header)
    except (nibabel.filebasedimages.ImageFileError, KeyError, ValueError):
        return None


def read_nifti_voxels(path: Path) -> np.ndarray:
    """Read the voxels of a NIfTI file in SimpleITK's order of axes: shape (z, y, x)."""
    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj).transpose()


def image_reader(path: Path) -> sitk.ImageFileReader:
    """Return a reader that has read the header of an image file; InputError if SimpleITK cannot read it."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(utf8_name(path, "read"))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"cannot be read: {last_line(error)}") from error
    return reader


def geometry_of(image: sitk.Image | sitk.ImageFileReader, *, volumes: int = 0) -> Geometry:
    """Return the grid of a scalar image of two or three dimensions, or of one whose header a reader has read.

    With ``volumes`` the image must have four dimensions and so many volumes; the last axis is left out.
    """
    if isinstance(image, sitk.ImageFileReader):
        components = image.GetNumberOfComponents()
    else:
        components = image.GetNumberOfComponentsPerPixel()
    dimension, size, spacing = image.GetDimension(), image.GetSize(), image.GetSpacing()
    origin, direction = image.GetOrigin(), image.GetDirection()
    if volumes:
        if dimension != 4 or size[3] != volumes or components != 1:
            raise InputError(f"has the size {short_text(size)}, expected {volumes} volumes of 3 dimensions in one file")
        return Geometry(size[:3], spacing[:3], origin[:3], direction[0:3] + direction[4:7] + direction[8:11])
    if dimension not in (2, 3) or components != 1:
        raise InputError(
            f"has {dimension} dimensions and {components} components, expected one scalar image of 2 or 3 dimensions"
        )
    return Geometry(size, spacing, origin, direction)


def read_image(path: Path) -> sitk.Image:
    """Read an image file; InputError if SimpleITK cannot read it."""
    try:
        return sitk.ReadImage(utf8_name(path, "read"))
    except RuntimeError as error:
        raise InputError(f"cannot be read: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """Return the last line of an error: ITK's first lines say where in ITK it was raised."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def short_text(values: Iterable[float]) -> str:
    """Return numbers in brackets, for messages."""
    return f"({', '.join(f'{value + 0.0:.6g}' for value in values)})"
