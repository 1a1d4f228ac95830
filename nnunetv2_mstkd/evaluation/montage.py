"""Slices of a case segmented from every subset, stored beside the case's results for the report.

The slices are chosen from the label before the network runs, so that each background process cuts them out of the
segmentation that it has just measured: no picture costs a prediction.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.nnunet.entropy import logit_entropy
from nnunetv2_mstkd.nnunet.preprocessing import in_percent

LONGEST = 256
"""Maximum edge of a picture in pixels; larger slices are subsampled."""

SLICES = 5
"""Slices that are kept of a case, at most."""

ENTROPY_STEP = 5
"""Entropies are kept in steps of so many percent: files and pages are less than half as large as in steps of one."""

_ZERO = 1e-6


@dataclass(frozen=True)
class SliceView:
    """A slice of an image in its original geometry, sampled as square pixels."""

    axis: int
    """The axis across which the slice lies."""
    index: int
    depth: int
    """Number of slices along the axis."""
    rows: np.ndarray
    columns: np.ndarray
    """Voxel indices along the two other axes, one per pixel."""
    reference: np.ndarray
    """The label in the slice, shape (rows, columns)."""
    further: tuple[SliceView, ...] = ()
    """Other slices along the axis, in their order."""

    @property
    def every(self) -> tuple[SliceView, ...]:
        """This slice and the others."""
        return self, *self.further

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """The pixels of a volume of the label's shape."""
        return np.take(volume, self.index, axis=self.axis)[np.ix_(self.rows, self.columns)]


def choose_view(label: np.ndarray, spacing: Sequence[float], ignore_label: int | None = None) -> SliceView:
    """Choose the slice with the most labelled voxels, across the axis with the thickest slices.

    Others, :data:`SLICES` in all, are spread evenly from the first to the last slice with a label. Where nothing is
    labelled it is the middle slice alone. Of equal axes the first is taken: the axial one, as nnU-Net reads.
    The label has three axes, the spacing is in millimetres per axis, and the ignore label counts as background.
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
        _voxels(size, max(1, math.floor(size * edge / pixel + 0.5))) for size, edge in zip(sizes, edges, strict=True)
    )

    def view(index: int, further: tuple[SliceView, ...] = ()) -> SliceView:
        reference = np.take(label, index, axis=axis)[np.ix_(rows, columns)]
        return SliceView(axis, index, label.shape[axis], rows, columns, reference, further)

    found = np.flatnonzero(counts)
    spread = np.linspace(found[0], found[-1], SLICES).round().astype(int).tolist() if len(found) else []
    if spread:  # the chosen one takes the place of the nearest
        spread.remove(min(spread, key=lambda other: abs(other - index)))
    return view(index, tuple(view(other) for other in dict.fromkeys(spread) if other != index))


def _voxels(size: int, pixels: int) -> np.ndarray:
    """The voxels under the centres of pixels."""
    return ((np.arange(pixels) + 0.5) * size / pixels).astype(int)


def slice_images(
    data: np.ndarray, properties: Mapping[str, Any], view: SliceView, transpose: Sequence[int]
) -> np.ndarray:
    """The images in a slice, from the output of nnU-Net's preprocessor.

    Parameters
    ----------
    data:
        Preprocessed image, shape (C, *spatial): transposed, cropped and resampled.
    properties:
        Properties from the preprocessor.
    view:
        The slice, in the original geometry.
    transpose:
        ``transpose_forward`` of the plans.

    Returns
    -------
    uint8, shape (C, rows, columns), 0 outside the crop and where an image is zero; each channel has its own window.
    """
    images, inside = _sampled(data, properties, view, transpose)
    return np.stack([_windowed(image) for image in images * inside])


def slice_entropy(
    logits: np.ndarray, properties: Mapping[str, Any], view: SliceView, transpose: Sequence[int], regions: bool
) -> np.ndarray:
    """Entropy in a slice in percent of its maximum, as ``mstkd predict --save-uncertainty`` writes it, but coarser.

    ``logits`` are those from which labels are decided: shape (K, *spatial), transposed and cropped; see
    :func:`slice_images` for the other arguments.

    Returns
    -------
    uint8, multiples of :data:`ENTROPY_STEP`, shape (rows, columns), 0 outside the crop.
    """
    values, inside = _sampled(logits, properties, view, transpose)
    steps = 100 // ENTROPY_STEP
    return in_percent((steps * logit_entropy(torch.from_numpy(values), regions) * inside).round() / steps)


def _sampled(
    data: np.ndarray, properties: Mapping[str, Any], view: SliceView, transpose: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The values (N, rows, columns) in a slice of data (N, *spatial), and what of it is inside the crop."""
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
    # back to the original order of axes, then without the one across which the slice lies
    back = [list(transpose).index(axis) for axis in range(3)]
    values = data[window].transpose(0, *(1 + axis for axis in back)).squeeze(1 + view.axis)
    return values, mask.transpose(back).squeeze(view.axis)


def _windowed(image: np.ndarray) -> np.ndarray:
    """Grey values from 1, the darkest percent, to 255; exact zeros, which are air or an absent image, stay 0."""
    there = np.abs(image) > _ZERO
    if not there.any():
        return np.zeros(image.shape, np.uint8)
    low, high = np.percentile(image[there], [1, 99.5])
    grey = 1 + 254 * ((image - low) / max(high - low, _ZERO)).clip(0, 1)
    return np.where(there, grey.round(), 0).astype(np.uint8)


@dataclass(frozen=True)
class Montage:
    """The pictures of a case in a slice; for its place see :class:`SliceView`."""

    axis: int
    index: int
    depth: int
    images: np.ndarray
    """uint8, shape (C, rows, columns)."""
    reference: np.ndarray
    """Label values, shape (rows, columns)."""
    segmentations: dict[str, np.ndarray]
    """Label values by subset, each of shape (rows, columns)."""
    entropies: dict[str, np.ndarray] = field(default_factory=dict)
    """Entropy by subset, from :func:`slice_entropy`, each of shape (rows, columns); older files have none."""
    further: tuple[Montage, ...] = ()
    """Other slices along the axis, in their order."""

    @property
    def every(self) -> list[Montage]:
        """The slices that show all subsets of this one, in their order."""
        whole = [each for each in self.further if self.segmentations.keys() <= each.segmentations.keys()]
        return sorted([self, *whole], key=lambda each: each.index)

    def with_older(self, older: Montage | None) -> Montage:
        """Add the subsets of an earlier run if it shows the same slice of the same label."""
        if older is None or older.index != self.index or not np.array_equal(older.reference, self.reference):
            return self
        known = {each.index: each for each in older.further}
        return replace(
            self,
            segmentations={**older.segmentations, **self.segmentations},
            entropies={**older.entropies, **self.entropies},
            further=tuple(each.with_older(known.get(each.index)) for each in self.further),
        )


def write_montage(montage: Montage, file: Path) -> None:
    """Write the pictures of a case atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}
    for number, each in enumerate((montage, *montage.further)):
        arrays = {
            "place": np.array([each.axis, each.index, each.depth]),
            "images": each.images,
            "reference": each.reference,
            "subsets": np.array(list(each.segmentations), dtype=str),
            "segmentations": np.stack(list(each.segmentations.values())),
        }
        if each.entropies:
            arrays["entropy_subsets"] = np.array(list(each.entropies), dtype=str)
            arrays["entropies"] = np.stack(list(each.entropies.values()))
        content |= {_key(name, number): array for name, array in arrays.items()}
    with atomic_write(file) as scratch, scratch.open("wb") as stream:
        np.savez_compressed(stream, **content)


def _key(name: str, number: int) -> str:
    """The name of an array in the file; files of earlier versions hold the first slice alone."""
    return f"{name}_{number}" if number else name


def read_montage(file: Path) -> Montage | None:
    """Read the pictures of a case; None if there are none, InputError if the file is damaged."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            found, number = list[Montage](), 0
            while not found or _key("place", number) in content:
                parts = {
                    name: content[_key(name, number)]
                    for name in ("place", "images", "reference", "subsets", "segmentations")
                }
                axis, index, depth = parts["place"].tolist()
                segmentations = dict(zip(parts["subsets"].tolist(), parts["segmentations"], strict=True))
                names, maps = (content.get(_key(name, number), ()) for name in ("entropy_subsets", "entropies"))
                entropies = {str(name): each for name, each in zip(names, maps, strict=True)}
                found.append(Montage(axis, index, depth, parts["images"], parts["reference"], segmentations, entropies))
                number += 1
            return replace(found[0], further=tuple(found[1:]))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged ({error}); evaluate again with --restart") from error
