"""One slice of a case segmented from every subset, kept beside the case's results for the pictures of the report.

The slice is chosen from the label before the network runs, so that each background process cuts it out of the
segmentation that it has just measured, and nothing is predicted twice for a picture.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import scratch_file

LONGEST = 256
"""Pixels of a picture at most; larger slices are thinned out."""

_ZERO = 1e-6


@dataclass(frozen=True)
class View:
    """A slice of an image in its original geometry, as square pixels.

    Attributes
    ----------
    axis, index:
        which slice, of ``depth`` ones.
    rows, columns:
        voxels along the two other axes, one per pixel.
    reference:
        the label there, shape (rows, columns).
    """

    axis: int
    index: int
    depth: int
    rows: np.ndarray
    columns: np.ndarray
    reference: np.ndarray

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """The pixels of an image of the label's shape."""
        return np.take(volume, self.index, axis=self.axis)[np.ix_(self.rows, self.columns)]


def choose_view(label: np.ndarray, spacing: Sequence[float], ignore_label: int | None = None) -> View:
    """The slice with the most labelled voxels, across the axis with the thickest slices.

    Parameters
    ----------
    label:
        integers, three axes.
    spacing:
        millimetres, in the order of the axes.
    ignore_label:
        counts as background.

    Returns
    -------
    A view; the middle slice where nothing is labelled. Of axes alike the first is cut: the axial one, as nnU-Net reads.
    """
    single = [axis for axis, size in enumerate(label.shape) if size == 1]
    axis = single[0] if single else int(np.argmax(np.round(spacing, 3)))
    labelled = label != 0
    if ignore_label is not None:
        labelled &= label != ignore_label
    others = tuple(other for other in range(label.ndim) if other != axis)
    counts = labelled.sum(axis=others)
    index = int(counts.argmax()) if counts.any() else label.shape[axis] // 2
    sizes = [label.shape[other] for other in others]
    edges = [float(spacing[other]) for other in others]
    pixel = max(min(edges), max(size * edge for size, edge in zip(sizes, edges, strict=True)) / LONGEST)
    rows, columns = (
        _places(size, max(1, math.floor(size * edge / pixel + 0.5))) for size, edge in zip(sizes, edges, strict=True)
    )
    reference = np.take(label, index, axis=axis)[np.ix_(rows, columns)]
    return View(axis, index, label.shape[axis], rows, columns, reference)


def _places(size: int, pixels: int) -> np.ndarray:
    """The voxels that lie under the centres of pixels."""
    return ((np.arange(pixels) + 0.5) * size / pixels).astype(int)


def background(data: np.ndarray, properties: Mapping[str, Any], view: View, transpose: Sequence[int]) -> np.ndarray:
    """The images under a view, from what nnU-Net's preprocessing made of them.

    Parameters
    ----------
    data:
        shape (C, *spatial): transposed, cropped and resampled.
    properties:
        of the preprocessor.
    view:
        in the original geometry.
    transpose:
        the plans' ``transpose_forward``.

    Returns
    -------
    uint8, shape (C, rows, columns), 0 outside the crop and where an image is zero; each channel has its own window.
    """
    wanted = [np.array([view.index])] * 3
    first, second = (axis for axis in range(3) if axis != view.axis)
    wanted[first], wanted[second] = view.rows, view.columns
    places, inside = [], []
    for axis, original in enumerate(transpose):
        low, high = properties["bbox_used_for_cropping"][axis]
        position = np.floor((wanted[original] - low + 0.5) * data.shape[1 + axis] / (high - low)).astype(int)
        inside.append((wanted[original] >= low) & (wanted[original] < high))
        places.append(position.clip(0, data.shape[1 + axis] - 1))
    mask = inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]
    window = (slice(None), *np.ix_(*places))
    images = data[window] * mask
    # back to the order of the original axes, then without the one that was cut
    back = [list(transpose).index(axis) for axis in range(3)]
    images = images.transpose(0, *(1 + axis for axis in back)).squeeze(1 + view.axis)
    return np.stack([_window(image) for image in images])


def _window(image: np.ndarray) -> np.ndarray:
    """Grey values from 1, the darkest percent, to 255; exact zeros, which are air or an absent image, stay 0."""
    there = np.abs(image) > _ZERO
    if not there.any():
        return np.zeros(image.shape, np.uint8)
    low, high = np.percentile(image[there], [1, 99.5])
    grey = 1 + 254 * ((image - low) / max(high - low, _ZERO)).clip(0, 1)
    return np.where(there, grey.round(), 0).astype(np.uint8)


@dataclass(frozen=True)
class CaseStrip:
    """The pictures of a case.

    Attributes
    ----------
    axis, index, depth:
        which slice; see :class:`View`.
    images:
        uint8, shape (C, rows, columns).
    reference:
        label values, shape (rows, columns).
    segmentations:
        the same by subset.
    """

    axis: int
    index: int
    depth: int
    images: np.ndarray
    reference: np.ndarray
    segmentations: dict[str, np.ndarray]

    def with_older(self, older: CaseStrip | None) -> CaseStrip:
        """Also the subsets of an earlier run, if it shows the same slice of the same label."""
        if older is None or older.index != self.index or not np.array_equal(older.reference, self.reference):
            return self
        both = {**older.segmentations, **self.segmentations}
        return CaseStrip(self.axis, self.index, self.depth, self.images, self.reference, both)


def write_strip(strip: CaseStrip, file: Path) -> None:
    """Write a strip, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with scratch_file(file) as scratch, scratch.open("wb") as stream:
        np.savez_compressed(
            stream,
            place=np.array([strip.axis, strip.index, strip.depth]),
            images=strip.images,
            reference=strip.reference,
            subsets=np.array(list(strip.segmentations), dtype=str),
            segmentations=np.stack(list(strip.segmentations.values())),
        )


def read_strip(file: Path) -> CaseStrip | None:
    """Read a strip; None if there is none.

    Raises
    ------
    ValueError
        if the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            axis, index, depth = content["place"].tolist()
            segmentations = dict(zip(content["subsets"].tolist(), content["segmentations"], strict=True))
            return CaseStrip(axis, index, depth, content["images"], content["reference"], segmentations)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged ({error}); evaluate again with --restart") from error
