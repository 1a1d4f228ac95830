"""Labels as raters draw them: uncertain boundaries, and small parts that one sees and another does not.

Exact labels leave a teacher nothing to add. Those of real data sets are not exact, and training is where it matters:
test labels stay as they are.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

SMOOTHNESS = 8.0
"""Of the field that moves boundaries: standard deviation of its Gaussian kernel, in mm."""
MISSED = 0.25
"""Probability that an innermost part (a connected component of the highest label) is not drawn."""


def perturb(label: sitk.Image, sigma: float, random: np.random.Generator) -> sitk.Image:
    """Move every boundary by a smooth random field, and miss some of the innermost parts.

    Parameters
    ----------
    label
        Nested integer labels: a higher one lies inside the lower ones, 0 is background.
    sigma
        Standard deviation of the displacement in mm; where positive the region grows.
    random
        Source of randomness.

    Returns
    -------
    A label image of the same geometry.
    """
    values, spacing = sitk.GetArrayFromImage(label), label.GetSpacing()[::-1]
    result = np.zeros_like(values)
    for value in range(1, int(values.max()) + 1):
        region = values >= value
        if value == values.max() > 1:
            parts, number = ndimage.label(region)
            seen = np.flatnonzero(random.random(number) >= MISSED) + 1
            region = np.isin(parts, seen)
        field = ndimage.gaussian_filter(random.standard_normal(values.shape), SMOOTHNESS / np.asarray(spacing))
        field *= sigma / max(field.std(), 1e-12)
        result[_signed_distance(region, spacing) < field] = value
    image = sitk.GetImageFromArray(result)
    image.CopyInformation(label)
    return image


def _signed_distance(region: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance to the boundary in mm, negative inside; infinite everywhere for an empty region."""
    if not region.any():
        return np.full(region.shape, np.inf)
    outside = ndimage.distance_transform_edt(~region, sampling=spacing)
    inside = ndimage.distance_transform_edt(region, sampling=spacing)
    return outside - inside
