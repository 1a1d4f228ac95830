"""Relabelling a small enhancing tumour: a separate step that no metric applies by itself.

A few predicted voxels where the reference has no enhancing tumour cost a whole case (Dice 0 instead of 1), so many
entries to BraTS, and some missing-modality papers ("ETpp"), drop a prediction below a size. Numbers with and without
it are not comparable: name it wherever it was used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.metrics.masks import MM3_PER_ML, check_spacing


def relabel_small_region(
    segmentation: np.ndarray,
    labels: int | Iterable[int],
    replacement: int,
    *,
    min_voxels: int | None = None,
    min_ml: float | None = None,
    spacing: Sequence[float] | None = None,
) -> np.ndarray:
    """Relabel a class that is smaller than a threshold.

    nnU-Net 1 gives the label of the necrosis to a small enhancing tumour, which leaves tumour core and whole tumour
    unchanged; ``replacement=0`` removes the voxels from these too.

    Parameters
    ----------
    segmentation:
        Integer labels.
    labels:
        The class, or several that count together.
    replacement:
        The label they are replaced with.
    min_voxels, min_ml:
        The threshold, as exactly one of the two; a class of this size or more is kept.
    spacing:
        Millimetres per axis, in the order of the array's axes; required for ``min_ml``.

    Returns
    -------
    A new segmentation of the same type.
    """
    if not isinstance(segmentation, np.ndarray) or not np.issubdtype(segmentation.dtype, np.integer):
        found = getattr(segmentation, "dtype", type(segmentation).__name__)
        raise InputError(f"the segmentation has type {found}, expected an array of integer labels")
    wanted = np.unique(np.asarray([labels] if isinstance(labels, int) else list(labels)))
    if replacement in wanted:
        raise InputError(f"the replacement {replacement} is one of the labels to replace, {wanted.tolist()}")
    if not np.can_cast(np.min_scalar_type(replacement), segmentation.dtype):
        raise InputError(f"the replacement {replacement} does not fit the segmentation's type {segmentation.dtype}")
    threshold = _threshold(segmentation.ndim, min_voxels, min_ml, spacing)
    small = np.isin(segmentation, wanted)
    result = segmentation.copy()
    if np.count_nonzero(small) < threshold:
        result[small] = replacement
    return result


def _threshold(num_axes: int, min_voxels: int | None, min_ml: float | None, spacing: Sequence[float] | None) -> float:
    """The threshold in voxels."""
    if (min_voxels is None) == (min_ml is None):
        raise InputError("give the threshold once: either min_voxels or min_ml")
    if min_voxels is not None:
        threshold = float(min_voxels)
    else:
        if spacing is None:
            raise InputError("a threshold in millilitres needs the spacing, in millimetres per axis")
        # slightly lower: a volume of exactly the threshold is kept, whatever the rounding of the spacing
        threshold = float(min_ml or 0) * MM3_PER_ML / float(np.prod(check_spacing(spacing, num_axes))) * (1 - 1e-9)
    if not 0 < threshold < np.inf:
        raise InputError(f"the threshold {min_voxels if min_ml is None else min_ml!r} is not positive and finite")
    return threshold
