"""Reading one image file with nnU-Net's reader, and noticing what nnU-Net would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import check_complete, count_not_finite, last_line
from nnunetv2_mstkd.images.geometry import Geometry, read_geometry


class Channel(NamedTuple):
    """One channel of a case.

    Attributes
    ----------
    grid:
        where the image lies.
    image:
        its voxels as nnU-Net sees them: float32, shape (x, y, z) in the reader's axis order.
    properties:
        of the reader; nnU-Net's exporter needs them.
    not_finite:
        number of voxels that are NaN or infinite in the file. ITK's NIfTI reader turns them into zeros.
    """

    grid: Geometry
    image: np.ndarray
    properties: dict
    not_finite: int


def read_checked(path: Path, reader: type[BaseReaderWriter]) -> Channel:
    """Read one channel of a case.

    Parameters
    ----------
    path:
        image file of any format that the reader supports.
    reader:
        nnU-Net's reader of the plans.

    Raises
    ------
    ValueError
        if the file cannot be read, is truncated or holds more than one image; the message begins with a verb.
    """
    in_file = check_complete(path)
    grid = read_grid(path, reader)
    image, properties = _read(path, reader)
    if image.shape[0] != 1:
        raise InputError(f"holds {image.shape[0]} images, expected one file per channel")
    if grid is None:  # formats without a place in space
        grid = Geometry(tuple(image.shape[1:]), tuple(properties["spacing"]), (), ())
    return Channel(grid, image[0], properties, max(in_file, count_not_finite(image)))


def read_grid(path: Path, reader: type[BaseReaderWriter]) -> Geometry | None:
    """Where an image lies, from its header and as the reader's own library understands it; None: the format is silent.

    Raises
    ------
    ValueError
        if the header cannot be read or is not that of one scalar image.
    """
    if issubclass(reader, SimpleITKIO):
        return read_geometry(path)
    if not issubclass(reader, (NibabelIO, NibabelIOWithReorient)):
        return None
    # ITK refuses sheared axes, which are a reason to use this reader
    image: Any = nibabel.load(path)
    if len(image.shape) != 3:
        raise InputError(f"has {len(image.shape)} dimensions, expected one scalar image of 3 dimensions")
    spacing = voxel_sizes(image.affine)
    direction = image.affine[:3, :3] / spacing
    return Geometry(image.shape, tuple(spacing), tuple(image.affine[:3, 3]), tuple(direction.ravel()))


def _read(path: Path, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict]:
    try:
        return reader().read_images([str(path)])
    except MemoryError:
        raise
    except Exception as error:  # each reader's library has its own errors, and nnU-Net asserts
        raise InputError(f"cannot be read or is truncated: {last_line(error)}") from error
