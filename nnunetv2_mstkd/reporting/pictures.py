"""Pictures as data URIs, so that a page is a single file."""

from __future__ import annotations

import base64
import functools
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib import colormaps
from PIL import Image
from scipy import ndimage

from nnunetv2_mstkd.evaluation.montage import ENTROPY_STEP, Montage

OPACITY = 150
"""Opacity of a label over the image, out of 255."""

MARGIN = 3
"""Pixels around the contents of a picture."""

HEAT = "magma"
"""Colour map of heat maps, safe for colour-blind readers: lightness grows evenly, from black to pale yellow."""

FINE = 192
"""Minimum edge of an overlay in pixels; in smaller ones the outline, one pixel wide, would hide the labels."""

Color = tuple[int, int, int]
IGNORED: Color = (128, 128, 128)


def file_uri(file: Path) -> str:
    """The content of a PNG file."""
    return _uri(file.read_bytes())


def grey_uri(image: np.ndarray) -> str:
    """A grey image, uint8, shape (rows, columns)."""
    return _encoded(Image.fromarray(image))


def heat_uri(percent: np.ndarray) -> str:
    """A map in percent, multiples of :data:`ENTROPY_STEP`, shape (rows, columns), in the colours of :data:`HEAT`."""
    steps = (percent // ENTROPY_STEP).astype(np.uint8)
    image = Image.frombytes("P", (steps.shape[1], steps.shape[0]), steps.tobytes())
    image.putpalette(_heat_palette())
    return _encoded(image)


@functools.cache
def _heat_palette() -> bytes:
    colors = colormaps[HEAT](np.arange(0, 101, ENTROPY_STEP) / 100)[:, :3]
    return (255 * colors).round().astype(np.uint8).tobytes()


def overlay_uri(labels: np.ndarray, colors: Mapping[int, Color], outline: np.ndarray | None = None) -> str:
    """A transparent image of integer labels, shape (rows, columns), that lies over a grey one.

    Labels without a colour are transparent; ``outline``, from :func:`outline_of` a mask of this shape, is drawn on top
    in white.
    """
    labels = _enlarged(labels)
    numbers = np.zeros_like(labels, dtype=np.uint8)
    palette, opacities = [(0, 0, 0)], [0]
    for number, (label, color) in enumerate(colors.items(), start=1):
        numbers[labels == label] = number
        palette.append(color)
        opacities.append(OPACITY)
    if outline is not None:
        numbers[outline] = len(palette)
        palette.append((255, 255, 255))
        opacities.append(255)
    size = numbers.shape[1], numbers.shape[0]
    image = Image.frombytes("P", size, numbers.tobytes())
    image.putpalette([value for color in palette for value in color])
    return _encoded(image, transparency=bytes(opacities))


def outline_of(mask: np.ndarray) -> np.ndarray:
    """The border of a mask, one pixel wide, in the size of the overlays."""
    mask = _enlarged(mask)
    return mask & ~ndimage.binary_erosion(mask)


def label_colors(labels: list[int], ignore_label: int | None) -> dict[int, Color]:
    """A colour per label, safe for colour-blind readers up to ten labels; grey for the ignore label."""
    shown = [label for label in labels if label not in (0, ignore_label)]
    palette = sns.color_palette("colorblind" if len(shown) <= 10 else "husl", len(shown))
    colors = {
        label: (round(255 * red), round(255 * green), round(255 * blue))
        for label, (red, green, blue) in zip(shown, palette, strict=True)
    }
    return colors if ignore_label is None else {**colors, ignore_label: IGNORED}


def fractions(color: Color) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1, as matplotlib takes them."""
    red, green, blue = (value / 255 for value in color)
    return red, green, blue


def region_colors(regions: Mapping[str, Sequence[int]], colors: Mapping[int, Color]) -> dict[str, Color]:
    """A colour per region: that of the label that is in the fewest other regions, so of WT the edema's.

    Parameters
    ----------
    regions:
        Labels of each region.
    colors:
        Colour of each label, from :func:`label_colors`.
    """
    members = Counter(label for labels in regions.values() for label in labels)
    return {name: colors[min(labels, key=lambda label: members[label])] for name, labels in regions.items()}


def cropped(montage: Montage) -> Montage:
    """Remove the border around the images and labels that is empty in all slices."""
    shown = np.zeros(montage.reference.shape, bool)
    for each in (montage, *montage.further):
        for part in (each.images.any(axis=0), each.reference, *each.segmentations.values()):
            shown |= part != 0
    if not shown.any():
        return montage
    rows, columns = (_extent(np.asarray(shown.any(axis=axis))) for axis in (1, 0))
    return _within(montage, (rows, columns))


def _within(montage: Montage, window: tuple[slice, slice]) -> Montage:
    return replace(
        montage,
        images=montage.images[:, window[0], window[1]],
        reference=montage.reference[window],
        segmentations={subset: labels[window] for subset, labels in montage.segmentations.items()},
        entropies={subset: entropy[window] for subset, entropy in montage.entropies.items()},
        further=tuple(_within(each, window) for each in montage.further),
    )


def clearest_image(montage: Montage) -> int:
    """The channel in which the labelled region differs most from the rest of the image."""
    labelled = montage.reference != 0
    contrasts = []
    for image in montage.images.astype(float):
        there = image > 0
        inside, outside = image[there & labelled], image[there & ~labelled]
        spread = image[there].std() if there.any() else 0.0
        clear = len(inside) and len(outside) and spread
        contrasts.append(abs(inside.mean() - outside.mean()) / spread if clear else float(there.any()) * 1e-9)
    return int(np.argmax(contrasts))


def _enlarged(image: np.ndarray) -> np.ndarray:
    times = max(1, math.ceil(FINE / max(image.shape)))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _extent(line: np.ndarray) -> slice:
    found = np.flatnonzero(line)
    return slice(max(0, int(found[0]) - MARGIN), int(found[-1]) + 1 + MARGIN)


def _encoded(image: Image.Image, **options: object) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return _uri(stream.getvalue())


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
