"""Reading one image file with nnU-Net's reader, and noticing what nnU-Net would not."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import check_complete, count_unusable
from nnunetv2_mstkd.images.geometry import (
    Forms,
    Geometry,
    last_line,
    read_affine,
    read_forms,
    read_geometry,
    read_nifti_voxels,
)

Reader: TypeAlias = type[BaseReaderWriter]
"""One of nnU-Net's classes that read and write images."""


class Channel(NamedTuple):
    """One channel of a case."""

    grid: Geometry
    image: np.ndarray
    """Its voxels as nnU-Net sees them: float32, shape (x, y, z) in the reader's axis order."""
    properties: dict[str, Any]
    """What nnU-Net's exporter needs to know from the reader."""
    unusable: int
    """Number of voxels that are NaN (of which ITK's NIfTI reader makes zeros), infinite or too large."""
    forms: Forms | None
    """Of a NIfTI file."""


def read_checked(path: Path, reader: Reader) -> Channel:
    """Read one channel of a case.

    Raises
    ------
    InputError
        If the file cannot be read, is truncated or holds more than one image; the message begins with a verb.
    """
    in_file = check_complete(path)
    grid = read_grid(path, reader)
    try:
        image, properties = reader().read_images([str(path)])
    except MemoryError:
        raise
    except Exception as error:  # each reader's library has its own errors, and nnU-Net asserts
        raise InputError(f"cannot be read or is truncated: {last_line(error)}") from error
    if image.shape[0] != 1:
        raise InputError(f"holds {image.shape[0]} images, expected one file per channel")
    if grid is None:
        grid = Geometry(tuple(image.shape[1:]), tuple(properties["spacing"]), (), ())
    return Channel(grid, image[0], properties, max(in_file, count_unusable(image)), read_forms(path))


def read_grid(path: Path, reader: Reader) -> Geometry | None:
    """Read the grid of an image from its header, as the reader's own library understands it.

    None for a format that says nothing about space, such as PNG; InputError for a header of another kind of image.
    """
    if issubclass(reader, SimpleITKIO):
        return read_geometry(path)
    if issubclass(reader, (NibabelIO, NibabelIOWithReorient)):
        return read_affine(path)  # ITK refuses sheared axes, which are a reason to use this reader
    return None


def as_written(segmentation: np.ndarray, properties: Mapping[str, Any], reader: Reader) -> np.ndarray:
    """Return a segmentation as an array of the voxels that nnU-Net's reader writes.

    Parameters
    ----------
    segmentation
        Labels in the reader's orientation, shape (z, y, x), as nnU-Net gives them to its method ``write_seg``.
    properties
        The reader's properties of the images.

    Returns
    -------
    Array in the orientation of the images, of two axes for two-dimensional images.
    """
    if issubclass(reader, (SimpleITKIOWithReorient, NibabelIOWithReorient)):
        with tempfile.TemporaryDirectory() as folder:  # they turn it back while they write it
            path = Path(folder, "segmentation.nii")
            reader().write_seg(segmentation, str(path), dict(properties))
            return read_nifti_voxels(path)
    flat = issubclass(reader, NaturalImage2DIO) or len(properties.get("sitk_stuff", {}).get("spacing", ())) == 2
    return segmentation[0] if flat else segmentation
