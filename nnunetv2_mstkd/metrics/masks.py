"""Checks of masks and spacing that all metrics share, and cropping to the foreground."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MM3_PER_ML = 1000.0


def check_masks(prediction: np.ndarray, reference: np.ndarray) -> None:
    """Raise ValueError unless both masks are non-empty boolean arrays of equal shape."""
    for name, mask in (("prediction", prediction), ("reference", reference)):
        if not isinstance(mask, np.ndarray):
            raise ValueError(f"the {name} is a {type(mask).__name__}, expected a numpy array of type bool")
        if mask.dtype != np.bool_:
            raise ValueError(
                f"the {name} has type {mask.dtype}, expected bool: a metric compares one region. Make its mask first, "
                f"for example np.isin(segmentation, (1, 3))"
            )
    if prediction.shape != reference.shape:
        raise ValueError(
            f"the prediction has shape {prediction.shape}, the reference {reference.shape}; expected equal shapes. "
            f"Compare both in the geometry of the original image"
        )
    if prediction.size == 0:
        raise ValueError(f"the masks have shape {prediction.shape} and no voxel; expected at least one")


def check_spacing(spacing: Sequence[float], num_axes: int) -> tuple[float, ...]:
    """Return the spacing as floats; ValueError unless there is one positive finite number per axis.

    It is in millimetres per axis, in the order of the array's axes. nnU-Net's ``properties["spacing"]`` has this order,
    and so have nibabel's zooms for an array from nibabel; SimpleITK's ``GetSpacing()`` (x, y, z) must be reversed for
    an array from ``GetArrayFromImage`` (z, y, x).
    """
    values = tuple(np.ravel(np.asarray(spacing, dtype=float)).tolist())
    if len(values) != num_axes:
        raise ValueError(
            f"the spacing {spacing!r} has {len(values)} numbers, the masks have {num_axes} axes; expected one number "
            f"in millimetres per axis, in the order of the axes"
        )
    if any(not 0 < value < math.inf for value in values):
        raise ValueError(f"the spacing {spacing!r} is not positive and finite along every axis")
    return values


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the image diagonal in millimetres, 373.13 for the 240 x 240 x 155 voxels of BraTS."""
    return math.sqrt(sum((size * step) ** 2 for size, step in zip(shape, spacing, strict=True)))


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box with all voxels of a mask, None for an empty mask."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        # cropped by the previous axes, which saves time
        hit = mask[tuple(box)].any(axis=tuple(other for other in range(mask.ndim) if other != axis))
        found = np.flatnonzero(hit)
        if len(found) == 0:
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def grow(box: Sequence[slice], margin: int, shape: Sequence[int]) -> tuple[slice, ...]:
    """Extend a box by ``margin`` voxels on every side, clipped to the image."""
    return tuple(
        slice(max(0, part.start - margin), min(size, part.stop + margin)) for part, size in zip(box, shape, strict=True)
    )
