"""Overlap and volume metrics of a pair of boolean masks, and :func:`score`, which computes all voxel metrics in one go.

Make a mask from a segmentation with ``np.isin``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2_mstkd.metrics.conventions import (
    BRATS,
    DICE,
    HD95,
    IOU,
    NSD,
    PRECISION,
    RELATIVE_VOLUME_ERROR,
    SENSITIVITY,
    VOLUME_ERROR,
    empty_value,
)
from nnunetv2_mstkd.metrics.masks import MM3_PER_ML, check_masks, check_spacing, image_diagonal
from nnunetv2_mstkd.metrics.surface import check_tolerance, hd95_of, normalized_surface_dice_of, surface_distances


def dice(prediction: np.ndarray, reference: np.ndarray, *, convention: str = BRATS) -> float:
    """Dice coefficient 2 |P and R| / (|P| + |R|) of two boolean masks of equal shape.

    The rules for empty masks are ``"brats"`` (both empty: 1) or ``"nnunet"`` (both empty: NaN, excluded from means).
    """
    return _overlap(DICE, prediction, reference, convention)


def iou(prediction: np.ndarray, reference: np.ndarray, *, convention: str = BRATS) -> float:
    """Intersection over union |P and R| / |P or R|, the Jaccard index. Parameters as for :func:`dice`."""
    return _overlap(IOU, prediction, reference, convention)


def sensitivity(prediction: np.ndarray, reference: np.ndarray, *, convention: str = BRATS) -> float:
    """Fraction of the reference that was found, |P and R| / |R|. Parameters as for :func:`dice`."""
    return _overlap(SENSITIVITY, prediction, reference, convention)


def precision(prediction: np.ndarray, reference: np.ndarray, *, convention: str = BRATS) -> float:
    """Fraction of the prediction that is correct, |P and R| / |P|. Parameters as for :func:`dice`."""
    return _overlap(PRECISION, prediction, reference, convention)


def relative_volume_error(prediction: np.ndarray, reference: np.ndarray, *, convention: str = BRATS) -> float:
    """Signed volume error (|P| - |R|) / |R|; -1 if everything was missed. Parameters as for :func:`dice`."""
    return _overlap(RELATIVE_VOLUME_ERROR, prediction, reference, convention)


def volume_error_ml(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """Signed volume error in millilitres; positive if the prediction is too large.

    The masks are boolean and of equal shape; the spacing is in millimetres per axis, in the order of their axes.
    """
    check_masks(prediction, reference)
    steps = check_spacing(spacing, prediction.ndim)
    return _volume_error(int(prediction.sum()), int(reference.sum()), steps)


def score(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    *,
    convention: str = BRATS,
    tolerance: float = 1.0,
    surfaces: bool = True,
    thickness: float = 1.0,
) -> dict[str, float]:
    """All voxel metrics of a pair of masks by name; voxels are counted and surfaces extracted once.

    Parameters
    ----------
    prediction, reference, spacing, convention, tolerance:
        As for :func:`volume_error_ml` and :func:`~nnunetv2_mstkd.metrics.surface.normalized_surface_dice`.
    surfaces:
        Also compute hd95 and nsd, which take most of the time.
    thickness:
        Millimetres of a slice whose masks lack the axis across it; volumes are multiplied by it.

    Returns
    -------
    dict with the keys dice, iou, hd95, nsd, sensitivity, precision, volume_error_ml and relative_volume_error.
    """
    check_masks(prediction, reference)
    check_tolerance(tolerance)
    steps = check_spacing(spacing, prediction.ndim)
    counts = _counts(prediction, reference)
    scores = {name: _from_counts(name, counts, convention) for name in (DICE, IOU, SENSITIVITY, PRECISION)}
    scores[VOLUME_ERROR] = _volume_error(counts[1], counts[2], (*steps, thickness))
    scores[RELATIVE_VOLUME_ERROR] = _from_counts(RELATIVE_VOLUME_ERROR, counts, convention)
    if not surfaces:
        return scores
    empty = {"prediction_empty": counts[1] == 0, "reference_empty": counts[2] == 0}
    if not any(empty.values()):
        distances = surface_distances(prediction, reference, steps)
        return scores | {HD95: hd95_of(distances), NSD: normalized_surface_dice_of(distances, tolerance)}
    diagonal = image_diagonal(prediction.shape, steps)
    for name in (HD95, NSD):
        value = empty_value(name, convention, diagonal=diagonal, **empty)
        assert value is not None, "no formula exists for a distance to nothing"
        scores[name] = value
    return scores


def _counts(prediction: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    """Voxels of the overlap, of the prediction and of the reference."""
    return (
        int(np.count_nonzero(prediction & reference)),
        int(np.count_nonzero(prediction)),
        int(np.count_nonzero(reference)),
    )


def _overlap(metric: str, prediction: np.ndarray, reference: np.ndarray, convention: str) -> float:
    check_masks(prediction, reference)
    return _from_counts(metric, _counts(prediction, reference), convention)


def _from_counts(metric: str, counts: tuple[int, int, int], convention: str) -> float:
    both, predicted, wanted = counts
    value = empty_value(metric, convention, prediction_empty=predicted == 0, reference_empty=wanted == 0)
    if value is not None:
        return value
    if metric == DICE:
        return 2 * both / (predicted + wanted)
    if metric == IOU:
        return both / (predicted + wanted - both)
    if metric == SENSITIVITY:
        return both / wanted
    if metric == PRECISION:
        return both / predicted
    return (predicted - wanted) / wanted


def _volume_error(predicted: int, wanted: int, spacing: tuple[float, ...]) -> float:
    return (predicted - wanted) * float(np.prod(spacing)) / MM3_PER_ML
