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
from nnunetv2_mstkd.metrics.surface import check_tolerance, hd95, normalized_surface_dice, surface_distances


def dice(prediction: np.ndarray, reference: np.ndarray, *, convention: str = BRATS) -> float:
    """Dice coefficient 2 |P and R| / (|P| + |R|) of two boolean masks of equal shape.

    The rules for empty masks are ``"brats"`` (both empty: 1) or ``"nnunet"`` (both empty: NaN, excluded from means).
    """
    check_masks(prediction, reference)
    return _from_counts(DICE, _counts(prediction, reference), convention)


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
    prediction, reference:
        Boolean masks of equal shape.
    spacing:
        Millimetres per axis, in the order of the array's axes.
    convention:
        The rules for empty masks, a name from :data:`~nnunetv2_mstkd.metrics.conventions.CONVENTIONS`.
    tolerance:
        Of nsd, in millimetres, at least 0.
    surfaces:
        Also compute hd95 and nsd, which take most of the time.
    thickness:
        Millimetres of a slice whose masks lack the axis across it; volumes are multiplied by it.

    Returns
    -------
    dict with the keys dice, iou (intersection over union), sensitivity (|P and R| / |R|), precision (|P and R| / |P|),
    volume_error_ml and relative_volume_error (signed, positive if the prediction is too large), hd95 (in millimetres)
    and nsd.
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
        return scores | {HD95: hd95(distances), NSD: normalized_surface_dice(distances, tolerance)}
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
