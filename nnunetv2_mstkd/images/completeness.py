"""Whether an image file is complete: ITK silently reads the missing rest of a truncated NIfTI file as zeros."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.geometry import geometry_of, image_reader, last_line

NIFTI_ENDINGS = (".nii", ".nii.gz")
GIPL_HEADER_BYTES = 256
VOXELS_AT_A_TIME = 1 << 20
LARGEST = 1e15
"""Larger voxels are no intensities. nnU-Net's normalisation squares float32 and would make zeros of the whole image."""
UNUSABLE = "NaN, infinite or beyond 1e15"
GZIP = 31
"""zlib's window size for a gzip stream."""


def check_complete(path: Path) -> int:
    """Refuse a truncated NIfTI or GIPL file, whose missing rest ITK silently reads as zeros or leftovers.

    The readers of other formats notice by themselves. The message of the InputError begins with a verb.

    Returns
    -------
    Number of unusable voxels of a NIfTI file, among them NaN, which ITK hides too; 0 for other formats.
    """
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return _check_nifti(path, gzip.open if name.endswith(".gz") else open)
    if name.endswith(".gipl"):
        header = image_reader(path)
        voxel = sitk.Image([1, 1], header.GetPixelID()).GetSizeOfPixelComponent()
        expected = GIPL_HEADER_BYTES + math.prod(geometry_of(header).size) * voxel
        _refuse_truncated(path.stat().st_size, expected)
    return 0


def _check_nifti(path: Path, opened: Callable) -> int:
    try:
        header: Any = nibabel.load(path)
        start, dtype, voxels = header.dataobj.offset, header.dataobj.dtype, math.prod(header.shape)
    except Exception as error:  # nibabel has errors of many kinds for a damaged header
        raise InputError(f"cannot be read: {last_line(error)}") from error
    expected = start + voxels * dtype.itemsize
    found = unusable = 0
    try:
        with opened(path, "rb") as file:
            found = len(file.read(start))
            while chunk := file.read(VOXELS_AT_A_TIME * dtype.itemsize):
                if np.issubdtype(dtype, np.floating):
                    left = max(0, expected - found) // dtype.itemsize
                    there = min(left, len(chunk) // dtype.itemsize)
                    unusable += count_unusable(np.frombuffer(chunk, dtype, there))
                found += len(chunk)
    except EOFError as error:
        raise InputError(f"is truncated: its compressed data end after {found} bytes of the image") from error
    except (OSError, zlib.error) as error:
        raise InputError(f"is damaged or cannot be read: {last_line(error)}") from error
    _refuse_truncated(found, expected)
    return unusable


def _refuse_truncated(found: int, expected: int) -> None:
    if found < expected:
        raise InputError(f"is truncated: it has {found} of {expected} bytes")


def is_proven_whole(path: Path, voxels: np.ndarray) -> bool:
    """Whether the checksum in a ``.nii.gz`` file is that of its header and of ``voxels``, in the file's order and type.

    It costs a tenth of decompressing the file, which another library has done to get the voxels. True means that the
    file is complete and that nothing was changed on the way, not even NaN. False means nothing: the file may be of
    another format, be damaged, be scaled by its header, or be compressed in several parts; :func:`check_complete` finds
    out.
    """
    if not path.name.lower().endswith(".nii.gz"):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
            file.seek(-8, 2)
            checksum, length = (int(value) for value in np.frombuffer(file.read(8), "<u4"))
        header = zlib.decompressobj(GZIP).decompress(start, nibabel.Nifti1Header.single_vox_offset)
        offset = int(nibabel.Nifti1Header(header[: nibabel.Nifti1Header.sizeof_hdr], check=False)["vox_offset"])
        header = zlib.decompressobj(GZIP).decompress(start, offset) if offset > 0 else b""
        if len(header) != offset or length != (offset + voxels.nbytes) % (1 << 32):
            return False
        return zlib.crc32(np.ascontiguousarray(voxels).data, zlib.crc32(header)) == checksum
    except (OSError, ValueError, zlib.error, nibabel.spatialimages.HeaderDataError):
        return False


def count_unusable(values: np.ndarray) -> int:
    """Return the number of values that are NaN, infinite or larger than :data:`LARGEST`."""
    return values.size - int(np.count_nonzero(np.abs(values) < LARGEST))
