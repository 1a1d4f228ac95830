"""Whether the zero voxels of a data set's modalities differ so much that taking some away changes the others.

nnU-Net's z-score runs within the union of the non-zero voxels of all channels (``use_mask_for_norm``), or within the
box around it. Where one sequence has skull or air and the others are stripped, that region is another for each subset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy.ndimage import binary_fill_holes

from nnunetv2_mstkd.errors import MissingFileError, UserError
from nnunetv2_mstkd.images.atomic import read_json
from nnunetv2_mstkd.nnunet.case_cache import kept_by_case
from nnunetv2_mstkd.nnunet.case_facts import THREADS
from nnunetv2_mstkd.nnunet.input_folder import Case, training_files
from nnunetv2_mstkd.nnunet.preprocessing import identifiers, read_case

CASES = 20
"""So many cases are read, evenly spread over a data set: differences are those of a pipeline, not of a case."""
OFFSET, FACTOR, SHARE = 0.25, 1.25, 0.1
"""A modality moves if its mean shifts by more sd or its contrast changes by more, in more than this share of the cases
and, of more than two, in at least two: a single image may be odd.

nnU-Net's augmentation multiplies intensities by 0.75 to 1.25, so a network has seen shifts of that size."""


@dataclass(frozen=True)
class Shift:
    """What becomes of a z-scored modality where all others are taken away: x -> factor x + a constant."""

    offset: float
    """How far the mean of its non-zero voxels moves, in standard deviations."""
    factor: float
    """By how much its contrast grows."""

    @property
    def large(self) -> bool:
        return abs(self.offset) > OFFSET or not 1 / FACTOR <= self.factor <= FACTOR


@dataclass(frozen=True)
class MaskDifferences:
    """The modalities that move in a data set."""

    moved: Mapping[str, Shift]
    """By name, the median shift over the cases in which it is large; empty if nothing is to be done."""
    cases: int
    """Number of cases that were read."""

    def __bool__(self) -> bool:
        return bool(self.moved)

    def __str__(self) -> str:
        shifts = ", ".join(
            f"{name} moves by {each.offset:+.2f} sd and x{each.factor:.2f}" for name, each in self.moved.items()
        )
        return f"the zero voxels of the modalities differ ({self.cases} cases read): without the others {shifts}"


# ---- one case --------------------------------------------------------------------------------------------------------


def find_shifts(images: np.ndarray, schemes: Sequence[str], use_mask: Sequence[bool]) -> list[Shift | None]:
    """Return the shift of each channel of a raw case, (C, x, y, z); None for one that is absent or has a single value,
    and for another normalisation.

    Only sums over the non-zero voxels and the number of voxels in a region are needed, because the others are zero.
    """
    masks = images != 0
    union = masks.any(0)
    size, filled = int(union.sum()), _Region(union)
    found: list[Shift | None] = []
    for image, mask, scheme, masked in zip(images, masks, schemes, use_mask, strict=True):
        own = int(mask.sum())
        # a channel with a single value, such as a mask, cannot be standardised by itself
        if not own or scheme != "ZScoreNormalization" or np.ptp(image[mask]) == 0:
            found.append(None)
        elif own == size:
            found.append(Shift(0.0, 1.0))
        else:
            values = image[mask].astype(np.float64)
            mean, square = values.mean(), np.square(values).mean()
            alone, together = (own / region.size(masked) for region in (_Region(mask), filled))
            (low, narrow), (high, wide) = (
                (mean * share, np.sqrt(max(square * share - (mean * share) ** 2, 1e-16))) for share in (alone, together)
            )
            found.append(Shift(float((mean - low) / narrow - (mean - high) / wide), float(wide / narrow)))
    return found


class _Region:
    """The voxels that nnU-Net normalises over: a mask with its holes filled, or the box around it."""

    def __init__(self, mask: np.ndarray) -> None:
        others = [tuple(axis for axis in range(mask.ndim) if axis != own) for own in range(mask.ndim)]
        ranges = [np.flatnonzero(mask.any(axes)) for axes in others]
        # a hole lies within the box, so filling there gives the same, sooner
        self._box = mask[tuple(slice(found[0], found[-1] + 1) for found in ranges)] if mask.any() else mask

    def size(self, masked: bool) -> int:
        return int(binary_fill_holes(self._box).sum()) if masked else self._box.size


def summarize(shifts: Sequence[Sequence[Shift | None]], names: Sequence[str]) -> MaskDifferences:
    """Return what moves in cases whose shifts are known."""
    moved = {}
    for channel, name in enumerate(names):
        known = [each for case in shifts if (each := case[channel]) is not None]
        large = [each for each in known if each.large]
        if len(large) > max(SHARE * len(known), 1 if len(known) > 2 else 0):
            moved[name] = Shift(
                float(np.median([each.offset for each in large])), float(np.median([each.factor for each in large]))
            )
    return MaskDifferences(moved, len(shifts))


# ---- many cases ------------------------------------------------------------------------------------------------------


def spread(items: Sequence[Any], number: int = CASES) -> list[Any]:
    """Return at most so many entries, evenly spread."""
    if len(items) <= number:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, number).round().astype(int)]


def of_images(
    cases: Sequence[Case],
    plans: PlansManager,
    configuration: ConfigurationManager,
    names: Sequence[str],
    number: int = CASES,
) -> MaskDifferences:
    """Read at most ``number`` of the cases with several modalities; nothing is known of images that cannot be read."""
    several = [case for case in cases if sum(case.availability) > 1]
    try:
        return summarize(_read(spread(several, number), plans, configuration), names)
    except Exception:  # what is wrong with an image is said where it is needed
        return summarize([], names)


def of_data_set(
    preprocessed: Path,
    raw: Path | None,
    plans: PlansManager,
    configuration: ConfigurationManager,
    names: Sequence[str],
    log: Callable[[str], None] = print,
) -> MaskDifferences | None:
    """Read some of the training cases of a data set; what they say is kept in ``CONFIGURATION_masks.json``.

    Parameters
    ----------
    preprocessed
        nnUNet_preprocessed/DatasetXXX_NAME. A case is read again when its preprocessed file has changed.
    raw
        The data set's folder below nnUNet_raw; None if there is none.

    Returns
    -------
    None if that is not known: some case is not kept, and its images cannot be read.
    """
    folder = preprocessed / configuration.data_identifier

    def read(unread: list[str]) -> list[list[Shift | None]]:
        if raw is None:
            raise MissingFileError("nnUNet_raw does not have the images")
        description = read_json(raw / "dataset.json")
        cases = [Case(case, training_files(raw, case, description, len(names)).images) for case in unread]
        return _read(cases, plans, configuration)

    try:
        chosen = spread(sorted(identifiers(folder)))
    except UserError:
        return None  # nnU-Net says what is wrong with the data
    try:
        shifts = kept_by_case(
            folder.with_name(f"{folder.name}_masks.json"),
            folder,
            chosen,
            read=read,
            encode=lambda found: [each and [each.offset, each.factor] for each in found],
            decode=lambda entry: [each and Shift(float(each[0]), float(each[1])) for each in entry],
            log=log,
            made_with=[list(configuration.normalization_schemes), list(configuration.use_mask_for_norm)],
            readable=raw is not None,
        )
    except Exception as error:  # whatever is wrong with an image: a training does not need it
        if raw is not None:
            log(f"whether the zero voxels of the modalities differ is not known: {type(error).__name__}: {error}")
        return None
    return summarize(list(shifts.values()), names)


def of_plans(
    preprocessed: Path, raw: Path | None, plans: Mapping[str, Any], name: str, names: Sequence[str]
) -> MaskDifferences | None:
    """:func:`of_data_set` for the configuration ``name`` of plans as they are in a file."""
    manager = PlansManager(dict(plans))
    return of_data_set(preprocessed, raw, manager, manager.get_configuration(name), names)


def _read(cases: Sequence[Case], plans: PlansManager, configuration: ConfigurationManager) -> list[list[Shift | None]]:
    schemes, use_mask = configuration.normalization_schemes, configuration.use_mask_for_norm
    reader = plans.image_reader_writer_class
    with ThreadPoolExecutor(THREADS) as pool:  # threads: reading releases the interpreter's lock
        return list(pool.map(lambda case: find_shifts(read_case(case, reader)[0], schemes, use_mask), cases))
