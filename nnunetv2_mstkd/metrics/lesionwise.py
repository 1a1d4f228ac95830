"""Lesion-wise Dice and HD95 as BraTS 2023 and 2024 define them.

Every lesion of the reference counts the same, whatever its size, and every false lesion counts as a lesion with the
worst value. :data:`~nnunetv2_mstkd.metrics.conventions.LESION_CONVENTIONS` has the numbers that differ by edition.
Dice is that of the organisers' code; HD95 is the one of :mod:`~nnunetv2_mstkd.metrics.surface`, where theirs weights
distances by surface area.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cc3d
import numpy as np
from scipy import ndimage

from nnunetv2_mstkd.metrics.conventions import (
    LESION_DICE,
    LESION_HD95,
    LESION_RULES,
    LesionConvention,
    lesion_convention_named,
)
from nnunetv2_mstkd.metrics.masks import bounding_box, check_masks, check_spacing, grow, image_diagonal
from nnunetv2_mstkd.metrics.surface import hd95, surface_distances


class Lesion(NamedTuple):
    """A lesion of the reference, and its scores against all predicted lesions that belong to it."""

    volume_mm3: float
    predicted: int
    """Number of predicted lesions that belong to it; 0: it was missed."""
    dice: float
    hd95_mm: float
    scored: bool
    """False if it is too small to count."""


class LesionwiseScores(NamedTuple):
    """Lesion-wise result of one region of one case: means over the scored lesions and the false ones, and counts."""

    dice: float
    hd95_mm: float
    true_positives: int
    false_negatives: int
    false_positives: int
    """Predicted lesions that belong to no lesion of the reference, not even to one too small to be scored."""
    lesions: tuple[Lesion, ...]
    """All lesions of the reference, in scan order."""


def lesionwise(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    convention: str = "brats2023_gli",
    *,
    region: str = "WT",
    partners: Sequence[tuple[np.ndarray, np.ndarray, str]] = (),
    thickness: float = 1.0,
) -> LesionwiseScores:
    """Lesion-wise Dice and HD95 of one region.

    Parameters
    ----------
    prediction, reference:
        Boolean masks of equal shape, 2-D or 3-D.
    spacing:
        Millimetres per axis, in the order of the array's axes.
    convention:
        A name from :data:`~nnunetv2_mstkd.metrics.conventions.LESION_CONVENTIONS`.
    region:
        Name of the region; some conventions have other numbers for ET, NETC and RC.
    partners:
        (prediction, reference, region) of the tissues that join lesions of this region, in the convention's order;
        :func:`lesionwise_regions` finds them by name.
    thickness:
        Millimetres of a slice whose masks lack the axis across it; volumes are multiplied by it.
    """
    settings = lesion_convention_named(convention)
    check_masks(prediction, reference)
    for other_prediction, other_reference, _ in partners:
        check_masks(other_prediction, other_reference)
        check_masks(prediction, other_prediction)
    if prediction.ndim not in (2, 3):
        raise ValueError(f"the masks have {prediction.ndim} axes; lesions are defined for 2 and 3")
    steps = check_spacing(spacing, prediction.ndim)
    penalty = image_diagonal(prediction.shape, steps) if settings.penalty_mm is None else float(settings.penalty_mm)

    masks = [prediction, reference, *(mask for pair in partners for mask in pair[:2])]
    box = bounding_box(np.logical_or.reduce(masks))
    if box is None:
        return _scores([], 0, penalty)
    # everything below happens near the masks: the box needs room for the widest dilation and one voxel more
    reach = max(settings.dilation_of(name) for name in (region, *(pair[2] for pair in partners)))
    box = grow(box, reach + 1, prediction.shape)

    wanted = _lesions(reference[box], region, settings, predicted=False)
    found = _lesions(prediction[box], region, settings, predicted=True)
    for other_prediction, other_reference, other in partners:
        found = _joined(found, _lesions(other_prediction[box], other, settings, predicted=True))
        wanted = _joined(wanted, _lesions(other_reference[box], other, settings, predicted=False))

    belongs = _belongings(wanted, found, settings.dilation_of(region))
    voxel = float(np.prod(steps)) * thickness
    of_found = ndimage.find_objects(found)
    lesions = []
    for number, part in enumerate(ndimage.find_objects(wanted), start=1):
        own = belongs[number]
        # one voxel of margin, or the box of a flat lesion would count as a 2-D image
        part = grow(_hull([part, *(of_found[other - 1] for other in own)]), 1, wanted.shape)
        lesion, matched = wanted[part] == number, np.isin(found[part], list(own))
        volume = int(np.count_nonzero(lesion)) * voxel
        dice, distance = float(LESION_RULES[LESION_DICE].prediction), penalty
        if own:
            sizes = int(np.count_nonzero(matched)) + int(np.count_nonzero(lesion))
            dice = 2 * int(np.count_nonzero(matched & lesion)) / sizes
            distance = hd95(surface_distances(matched, lesion, steps))
        lesions.append(Lesion(volume, len(own), dice, distance, volume > settings.min_volume_of(region)))
    false = int(found.max()) - len(set().union(*belongs.values()))
    return _scores(lesions, false, penalty)


def lesionwise_regions(
    predictions: Mapping[str, np.ndarray],
    references: Mapping[str, np.ndarray],
    spacing: Sequence[float],
    convention: str = "brats2023_gli",
    *,
    thickness: float = 1.0,
) -> dict[str, LesionwiseScores]:
    """Lesion-wise Dice and HD95 of several regions of a case, with the partners that the convention names.

    Parameters
    ----------
    predictions, references:
        Masks by region name, including those of the partners: for ET in ``brats2024_gli`` also NETC and RC.
    spacing, convention, thickness:
        As for :func:`lesionwise`.
    """
    settings = lesion_convention_named(convention)
    scores = {}
    for region in predictions:
        names = settings.partners.get(region, ())
        for name in (region, *names):
            if name not in predictions or name not in references:
                missing = "references" if name in predictions else "predictions"
                joins = f"; {convention} joins lesions of {region} that touch the same {name}"
                reason = "" if name == region else joins
                raise ValueError(f"the {missing} have no mask of {name}{reason}. Pass its masks too")
        scores[region] = lesionwise(
            predictions[region],
            references[region],
            spacing,
            convention,
            region=region,
            partners=[(predictions[name], references[name], name) for name in names],
            thickness=thickness,
        )
    return scores


def _scores(lesions: list[Lesion], false: int, penalty: float) -> LesionwiseScores:
    scored = [lesion for lesion in lesions if lesion.scored]
    total = len(scored) + false
    if total == 0:
        dice, distance = (float(LESION_RULES[name].both) for name in (LESION_DICE, LESION_HD95))
    else:
        dice = (sum(lesion.dice for lesion in scored) + false * float(LESION_RULES[LESION_DICE].reference)) / total
        distance = (sum(lesion.hd95_mm for lesion in scored) + false * penalty) / total
    hits = sum(lesion.predicted > 0 for lesion in scored)
    return LesionwiseScores(dice, distance, hits, len(scored) - hits, false, tuple(lesions))


def _lesions(mask: np.ndarray, region: str, settings: LesionConvention, *, predicted: bool) -> np.ndarray:
    """Number the lesions of a mask 1, 2 ... in scan order, 0 elsewhere."""
    if predicted and not settings.group_predictions:
        return _components(mask)
    lesions = np.where(mask, _components(_dilated(mask, settings.dilation_of(region))), 0)
    if predicted:
        sizes = np.bincount(lesions.ravel())
        lesions[sizes[lesions] <= settings.min_volume_of(region)] = 0
    return _renumbered(lesions)


def _components(mask: np.ndarray) -> np.ndarray:
    """Connected components with all 26 neighbours (8 in 2-D)."""
    # contiguous: cc3d takes the axes of a view in another order
    return cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26 if mask.ndim == 3 else 8)


def _dilated(mask: np.ndarray, iterations: int) -> np.ndarray:
    """Dilate with the 18 neighbours (8 in 2-D)."""
    return ndimage.binary_dilation(mask, _neighbours(mask.ndim), iterations=iterations)


def _neighbours(num_axes: int) -> np.ndarray:
    return ndimage.generate_binary_structure(num_axes, min(2, num_axes))


def _renumbered(lesions: np.ndarray) -> np.ndarray:
    """The same lesions as 1, 2 ... in scan order of their first voxels."""
    inside = lesions > 0
    _, first, inverse = np.unique(lesions[inside], return_index=True, return_inverse=True)
    result = np.zeros(lesions.shape, dtype=np.int32)
    result[inside] = first.argsort().argsort()[inverse] + 1
    return result


def _joined(lesions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Give lesions that touch the same lesion of a partner one number.

    A lesion that touches several of them goes with the first of these in scan order.
    """
    touched: dict[int, int] = {}
    for lesion, other in sorted(_touching(lesions, others)):
        touched.setdefault(lesion, other)
    numbers = np.arange(int(lesions.max()) + 1)
    for lesion, other in touched.items():
        numbers[lesion] = len(numbers) + other
    return _renumbered(numbers[lesions])


def _touching(lesions: np.ndarray, others: np.ndarray) -> set[tuple[int, int]]:
    """Numbers of lesions and partners of which voxels are 18-neighbours or the same."""
    pairs: set[tuple[int, int]] = set()
    for shift in np.argwhere(_neighbours(lesions.ndim)) - 1:
        here, there = (
            tuple(slice(max(0, -step), size - max(0, step)) for step, size in zip(way, lesions.shape, strict=True))
            for way in (shift, -shift)
        )
        pairs |= _pairs(lesions[here], others[there])
    return pairs


def _pairs(first: np.ndarray, second: np.ndarray) -> set[tuple[int, int]]:
    """The pairs of numbers above 0 that two arrays have at the same voxel."""
    both = (first > 0) & (second > 0)
    width = int(second.max(initial=0)) + 1
    codes = np.unique(first[both].astype(np.int64) * width + second[both])
    return {divmod(int(code), width) for code in codes}


def _belongings(wanted: np.ndarray, found: np.ndarray, dilation: int) -> dict[int, set[int]]:
    """Which predicted lesions touch the dilation of each lesion of the reference."""
    # Two lesions never share a component of the dilated mask, or they would be one lesion: one dilation serves all.
    areas = _components(_dilated(wanted > 0, dilation))
    owner = np.zeros(int(areas.max()) + 1, dtype=wanted.dtype)
    owner[areas[wanted > 0]] = wanted[wanted > 0]
    belongs: dict[int, set[int]] = {number: set() for number in range(1, int(wanted.max()) + 1)}
    for number, other in _pairs(owner[areas], found):
        belongs[number].add(other)
    return belongs


def _hull(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around several."""
    return tuple(slice(min(p.start for p in parts), max(p.stop for p in parts)) for parts in zip(*boxes, strict=True))
