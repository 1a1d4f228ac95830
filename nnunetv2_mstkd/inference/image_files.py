"""Reading one image file with nnU-Net's reader, and noticing what nnU-Net would not."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.affines import voxel_sizes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_mstkd.dataset_conversion.geometry import Geometry, read_geometry

NIFTI_ENDINGS = (".nii", ".nii.gz")
GIPL_HEADER_BYTES = 256
VOXELS_AT_A_TIME = 1 << 20


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
        raise ValueError(f"holds {image.shape[0]} images, expected one file per channel")
    if grid is None:  # formats without a place in space
        grid = Geometry(tuple(image.shape[1:]), tuple(properties["spacing"]), (), ())
    return Channel(grid, image[0], properties, max(in_file, _count_not_finite(image)))


def check_complete(path: Path) -> int:
    """Refuse a truncated NIfTI or GIPL file: ITK reads zeros or leftovers for the missing rest, without a word.

    Other formats are left to their readers, which notice.

    Returns
    -------
    Number of NaN and infinite voxels of a NIfTI file, which ITK hides too; 0 for other formats.

    Raises
    ------
    ValueError
        if bytes are missing, a compressed file fails its checksum, or the header cannot be read.
    """
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return _check_nifti(path, gzip.open if name.endswith(".gz") else open)
    if name.endswith(".gipl"):
        voxels = math.prod(read_geometry(path).size)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        expected = GIPL_HEADER_BYTES + voxels * sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
        _refuse_truncated(path.stat().st_size, expected)
    return 0


def _check_nifti(path: Path, opened: Callable) -> int:
    try:
        header: Any = nibabel.load(path)
        start, dtype, voxels = header.dataobj.offset, header.dataobj.dtype, math.prod(header.shape)
    except Exception as error:  # nibabel has errors of many kinds for a damaged header
        raise ValueError(f"cannot be read: {_line(error)}") from error
    expected = start + voxels * dtype.itemsize
    found = not_finite = 0
    try:
        with opened(path, "rb") as file:
            found = len(file.read(start))
            while chunk := file.read(VOXELS_AT_A_TIME * dtype.itemsize):
                if np.issubdtype(dtype, np.floating):
                    left = max(0, expected - found) // dtype.itemsize
                    there = min(left, len(chunk) // dtype.itemsize)
                    not_finite += _count_not_finite(np.frombuffer(chunk, dtype, there))
                found += len(chunk)
    except EOFError as error:
        raise ValueError(f"is truncated: its compressed data end after {found} bytes of the image") from error
    except (OSError, zlib.error) as error:
        raise ValueError(f"is damaged or cannot be read: {_line(error)}") from error
    _refuse_truncated(found, expected)
    return not_finite


def _refuse_truncated(found: int, expected: int) -> None:
    if found < expected:
        raise ValueError(f"is truncated: it has {found} of {expected} bytes")


def _count_not_finite(values: np.ndarray) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))


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
        raise ValueError(f"has {len(image.shape)} dimensions, expected one scalar image of 3 dimensions")
    spacing = voxel_sizes(image.affine)
    direction = image.affine[:3, :3] / spacing
    return Geometry(image.shape, tuple(spacing), tuple(image.affine[:3, 3]), tuple(direction.ravel()))


def _read(path: Path, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict]:
    try:
        return reader().read_images([str(path)])
    except MemoryError:
        raise
    except Exception as error:  # each reader's library has its own errors, and nnU-Net asserts
        raise ValueError(f"cannot be read or is truncated: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The last line of an error: ITK's first ones say where in ITK."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
