"""Distances between the surfaces of two masks: one pass feeds HD95 and the normalised surface Dice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.metrics.conventions import BRATS, HD95, NSD, empty_value
from nnunetv2_mstkd.metrics.masks import bounding_box, check_masks, check_spacing, image_diagonal

HD95_VARIANTS = ("pooled", "directed_max")
NSD_VARIANTS = ("pooled", "mean")


class SurfaceDistances(NamedTuple):
    """Millimetres from each surface voxel of a mask to the nearest surface voxel of the other one.

    Attributes
    ----------
    prediction:
        shape (surface voxels of the prediction,).
    reference:
        shape (surface voxels of the reference,).
    """

    prediction: np.ndarray
    reference: np.ndarray


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two non-empty masks, in both directions.

    The surface is what erosion with the 2 D neighbours of D axes takes away (6 in 3-D, as in medpy); outside the image
    is background. An axis with a single voxel is no axis: a 2-D image stored as (1, H, W) has a contour.

    Parameters
    ----------
    prediction, reference:
        bool, equal shape, any number of axes.
    spacing:
        millimetres, in the order of the array's axes.

    Raises
    ------
    ValueError
        for wrong masks or spacing, or where a mask is empty: there is no distance then, see
        :data:`~nnunetv2_mstkd.metrics.conventions.CONVENTIONS`.
    """
    check_masks(prediction, reference)
    steps = check_spacing(spacing, prediction.ndim)
    for name, mask in (("prediction", prediction), ("reference", reference)):
        if not mask.any():
            raise ValueError(f"the {name} is empty and has no surface; hd95 and normalized_surface_dice have rules")
    return _distances(prediction, reference, steps)


def hd95(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    *,
    variant: str = "pooled",
    convention: str = BRATS,
) -> float:
    """95th percentile of the Hausdorff distance, millimetres.

    Parameters
    ----------
    prediction, reference:
        bool, equal shape.
    spacing:
        millimetres, in the order of the array's axes.
    variant:
        ``"pooled"``: the percentile over the distances of both directions together, as medpy, nnU-Net 1, panoptica and
        most papers; ``"directed_max"``: the larger of the two directions' percentiles, as MONAI. They differ by 10 to
        20 % as a rule. The code of BraTS 2023 and 2024 weights by surface area, a third definition.
    convention:
        the rule for empty masks.

    Raises
    ------
    ValueError
        for wrong masks, spacing, variant or convention.
    """
    check_hd95_variant(variant)
    check_masks(prediction, reference)
    steps = check_spacing(spacing, prediction.ndim)
    value = empty_value(
        HD95,
        convention,
        prediction_empty=not prediction.any(),
        reference_empty=not reference.any(),
        diagonal=image_diagonal(prediction.shape, steps),
    )
    return hd95_of(_distances(prediction, reference, steps), variant=variant) if value is None else value


def hd95_of(distances: SurfaceDistances, *, variant: str = "pooled") -> float:
    """HD95 from :func:`surface_distances`, millimetres."""
    check_hd95_variant(variant)
    if variant == "directed_max":
        return float(max(np.percentile(distances.prediction, 95), np.percentile(distances.reference, 95)))
    return float(np.percentile(np.concatenate(distances), 95))


def normalized_surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    tolerance: float = 1.0,
    *,
    variant: str = "pooled",
    convention: str = BRATS,
) -> float:
    """Share of the two surfaces that lies within ``tolerance`` millimetres of the other one.

    Nikolov et al., arXiv 1809.04430, with voxels in place of surface elements.

    Parameters
    ----------
    prediction, reference:
        bool, equal shape.
    spacing:
        millimetres, in the order of the array's axes.
    tolerance:
        millimetres, at least 0; a distance equal to it is within.
    variant:
        ``"pooled"``: over the voxels of both surfaces together; ``"mean"``: mean of the two surfaces' shares, as in
        nnU-Net 1 and BraTS 2024.
    convention:
        the rule for empty masks.

    Raises
    ------
    ValueError
        for wrong masks, spacing, tolerance, variant or convention.
    """
    _check_variant(variant, NSD_VARIANTS, "the normalised surface Dice")
    check_tolerance(tolerance)
    check_masks(prediction, reference)
    steps = check_spacing(spacing, prediction.ndim)
    value = empty_value(NSD, convention, prediction_empty=not prediction.any(), reference_empty=not reference.any())
    if value is not None:
        return value
    return normalized_surface_dice_of(_distances(prediction, reference, steps), tolerance, variant=variant)


def normalized_surface_dice_of(distances: SurfaceDistances, tolerance: float, *, variant: str = "pooled") -> float:
    """Normalised surface Dice from :func:`surface_distances`."""
    _check_variant(variant, NSD_VARIANTS, "the normalised surface Dice")
    check_tolerance(tolerance)
    # 3 * 0.1 > 0.3 in floating point: three voxels of 0.1 mm are within 0.3 mm all the same
    limit = tolerance * (1 + 1e-9)
    within = [int(np.count_nonzero(part <= limit)) for part in distances]
    sizes = [len(part) for part in distances]
    if variant == "mean":
        return (within[0] / sizes[0] + within[1] / sizes[1]) / 2
    return sum(within) / sum(sizes)


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is not a number of millimetres."""
    if not 0 <= tolerance < np.inf:
        raise InputError(f"the tolerance {tolerance!r} is not a number of millimetres; expected 0 or more")


def check_hd95_variant(variant: str) -> None:
    """Refuse an unknown definition of HD95."""
    _check_variant(variant, HD95_VARIANTS, "HD95")


def _check_variant(variant: str, known: tuple[str, ...], metric: str) -> None:
    if variant not in known:
        raise ValueError(f"unknown variant {variant!r} of {metric}; known are {', '.join(known)}")


def _distances(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> SurfaceDistances:
    """The distances of two masks that are known to be non-empty."""
    kept = [axis for axis, size in enumerate(prediction.shape) if size > 1] or [0]
    if len(kept) < prediction.ndim:
        dropped = tuple(axis for axis in range(prediction.ndim) if axis not in kept)
        prediction, reference = prediction.squeeze(dropped), reference.squeeze(dropped)
        spacing = tuple(spacing[axis] for axis in kept)
    box = bounding_box(prediction | reference)
    assert box is not None, "called with two empty masks"
    of_prediction, of_reference = surface(prediction[box]), surface(reference[box])
    # voxels that are surface of both have distance 0 and need no search: most of them in a good segmentation
    shared = of_prediction & of_reference
    steps = np.asarray(spacing)
    return SurfaceDistances(
        _one_way(of_prediction, of_reference, shared, steps), _one_way(of_reference, of_prediction, shared, steps)
    )


def _one_way(source: np.ndarray, target: np.ndarray, shared: np.ndarray, steps: np.ndarray) -> np.ndarray:
    distances = np.zeros(np.count_nonzero(source))
    alone = np.argwhere(source & ~shared)
    if len(alone):
        # A single round of queries does not repay a tidier tree; measured, mostly on surfaces far from each other.
        tree = cKDTree(np.argwhere(target) * steps, leafsize=32, balanced_tree=False, compact_nodes=False)
        distances[-len(alone) :] = tree.query(alone * steps)[0]
    return distances


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask with a face that is not shared with another of its voxels; bool, same shape.

    Equal to ``mask ^ scipy.ndimage.binary_erosion(mask)``, as shifted copies, which is several times faster.
    """
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis, size in enumerate(mask.shape):
        for start in (0, 2):
            index = [slice(1, -1)] * mask.ndim
            index[axis] = slice(start, start + size)
            inner &= padded[tuple(index)]
    return mask & ~inner
