"""Pictures as data URIs, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import seaborn as sns
from PIL import Image
from scipy import ndimage

from nnunetv2_mstkd.evaluation.strips import CaseStrip

OPACITY = 150
"""Of a label over the image, of 255."""

MARGIN = 3
"""Pixels around what a strip shows."""

FINE = 192
"""Pixels of an overlay at least, or the outline, one pixel wide, would hide the labels of small images."""

Color = tuple[int, int, int]
IGNORED: Color = (128, 128, 128)


def file_uri(file: Path) -> str:
    """The content of a PNG file."""
    return _uri(file.read_bytes())


def grey_uri(image: np.ndarray) -> str:
    """A grey image, uint8, shape (rows, columns)."""
    return _encoded(Image.fromarray(image))


def overlay_uri(labels: np.ndarray, colors: Mapping[int, Color], outline: np.ndarray | None = None) -> str:
    """A transparent image that lies over a grey one.

    Parameters
    ----------
    labels:
        integers, shape (rows, columns); those without a colour are transparent.
    colors:
        by label.
    outline:
        a mask whose border is drawn in white on top.
    """
    times = max(1, math.ceil(FINE / max(labels.shape)))
    labels = _enlarged(labels, times)
    numbers = np.zeros_like(labels, dtype=np.uint8)
    palette, opacities = [(0, 0, 0)], [0]
    for number, (label, color) in enumerate(colors.items(), start=1):
        numbers[labels == label] = number
        palette.append(color)
        opacities.append(OPACITY)
    if outline is not None:
        outline = _enlarged(outline, times)
        numbers[outline & ~ndimage.binary_erosion(outline)] = len(palette)
        palette.append((255, 255, 255))
        opacities.append(255)
    size = numbers.shape[1], numbers.shape[0]
    image = Image.frombytes("P", size, numbers.tobytes())
    image.putpalette([value for color in palette for value in color])
    return _encoded(image, transparency=bytes(opacities))


def label_colors(labels: list[int], ignore_label: int | None) -> dict[int, Color]:
    """A colour per label that colour-blind people can tell apart (up to ten); grey for what is not counted."""
    shown = [label for label in labels if label not in (0, ignore_label)]
    palette = sns.color_palette("colorblind" if len(shown) <= 10 else "husl", len(shown))
    colors: dict[int, Color] = {}
    for label, color in zip(shown, palette, strict=True):
        red, green, blue = (round(255 * part) for part in color)
        colors[label] = red, green, blue
    return colors if ignore_label is None else {**colors, ignore_label: IGNORED}


def cropped(strip: CaseStrip) -> CaseStrip:
    """Without the empty border around the images and labels."""
    shown = strip.images.any(axis=0) | (strip.reference != 0)
    for segmentation in strip.segmentations.values():
        shown |= segmentation != 0
    if not shown.any():
        return strip
    rows, columns = (_extent(shown.any(axis=axis)) for axis in (1, 0))
    window = (rows, columns)
    segmentations = {subset: labels[window] for subset, labels in strip.segmentations.items()}
    images = strip.images[:, rows, columns]
    return CaseStrip(strip.axis, strip.index, strip.depth, images, strip.reference[window], segmentations)


def clearest_image(strip: CaseStrip) -> int:
    """The channel in which what is labelled differs most from the rest of the image."""
    labelled = strip.reference != 0
    contrasts = []
    for image in strip.images.astype(float):
        there = image > 0
        inside, outside = image[there & labelled], image[there & ~labelled]
        spread = image[there].std() if there.any() else 0.0
        clear = len(inside) and len(outside) and spread
        contrasts.append(abs(inside.mean() - outside.mean()) / spread if clear else float(there.any()) * 1e-9)
    return int(np.argmax(contrasts))


def _enlarged(image: np.ndarray, times: int) -> np.ndarray:
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _extent(line: np.ndarray) -> slice:
    found = np.flatnonzero(line)
    return slice(max(0, int(found[0]) - MARGIN), int(found[-1]) + 1 + MARGIN)


def _encoded(image: Image.Image, **options: object) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True, **options)
    return _uri(stream.getvalue())


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
