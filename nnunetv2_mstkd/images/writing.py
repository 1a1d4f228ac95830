"""Writing images with SimpleITK."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import complete_image
from nnunetv2_mstkd.images.geometry import last_line, read_image

ImageInMemory: TypeAlias = "sitk.Image | tuple[np.ndarray, Sequence[float]]"
"""A SimpleITK image, or an array of shape (z, y, x) or (y, x) with the spacing of its axes, in that order, in mm."""


def write_on_grid_of(reference: Path, path: Path, target: Path) -> None:
    """Copy an image file, giving the copy exactly the spacing, origin and direction of another one."""
    image = read_image(path)
    image.CopyInformation(read_image(reference))
    with complete_image(target):
        sitk.WriteImage(image, str(target), useCompression=True)


def write_given(image: ImageInMemory, target: Path) -> None:
    """Write an image that a caller holds in memory, uncompressed; the messages of InputErrors begin with a verb."""
    given = image if isinstance(image, sitk.Image) else _from_array(image)
    with complete_image(target):
        try:
            sitk.WriteImage(given, str(target))
        except RuntimeError as error:
            raise InputError(f"cannot be written as {target.suffix}: {last_line(error)}") from error


def _from_array(given: Any) -> sitk.Image:
    try:
        array, spacing = given
        array, spacing = np.asarray(array), [float(edge) for edge in spacing]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"is a {type(given).__name__}, expected a path, a SimpleITK.Image or a pair (array, spacing)"
        ) from error
    if array.ndim not in (2, 3) or len(spacing) != array.ndim or not all(0 < edge < np.inf for edge in spacing):
        raise InputError(
            f"has an array of shape {array.shape} and the spacing {tuple(spacing)}, expected 2 or 3 axes and a "
            f"positive spacing in mm for each"
        )
    if array.dtype == bool or not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise InputError(f"has an array of type {array.dtype}, expected real numbers")
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    return image
