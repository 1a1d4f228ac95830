"""The voxel grid of a phantom and smooth random fields that are the same field at every voxel size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

FIELD_OF_VIEW_MM = ((-80.0, 80.0), (-114.0, 82.0), (-78.0, 86.0))
"""Extent of every phantom in x (left to right), y (back to front), z (down to up); MNI152 coordinates."""


@dataclass(frozen=True)
class Grid:
    """Isotropic voxel grid over the field of view. Arrays are indexed (z, y, x), as SimpleITK and nnU-Net do."""

    spacing: float

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates of the voxel centers along z, y and x, in mm, float32."""
        z, y, x = (self._axis(*limits) for limits in reversed(FIELD_OF_VIEW_MM))
        return z, y, x

    def _axis(self, low: float, high: float) -> np.ndarray:
        count = int(np.floor((high - low) / self.spacing))
        center = 0.5 * (low + high)
        return (center + (np.arange(count) - 0.5 * (count - 1)) * self.spacing).astype(np.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along (z, y, x)."""
        z, y, x = self.axes
        return len(z), len(y), len(x)

    @property
    def origin(self) -> tuple[float, float, float]:
        """World position (x, y, z) in mm of the first voxel."""
        z, y, x = self.axes
        return float(x[0]), float(y[0]), float(z[0])

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in milliliters."""
        return self.spacing**3 / 1000.0

    @cached_property
    def zyx(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Open (broadcastable) coordinate arrays z, y, x in mm."""
        z, y, x = self.axes
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def to_index(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
        """Turn positions in mm into fractional voxel indices (z, y, x)."""
        return [(value - axis[0]) / self.spacing for value, axis in zip((z, y, x), self.axes, strict=True)]


def smooth_noise(rng: np.random.Generator, grid: Grid, pitch_mm: float) -> np.ndarray:
    """Draw a smooth random field: white noise on a lattice, interpolated by uniform cubic B-splines.

    The lattice is fixed in mm, so the number of random values and the field itself do not depend on the voxel size.
    Only elementwise sums are used (no matrix product), so that the result does not depend on a BLAS thread count.

    Parameters
    ----------
    pitch_mm
        Distance of the lattice nodes; structures are about twice as large.

    Returns
    -------
    ndarray of float32, shape ``grid.shape``, mean 0 and standard deviation close to 1.
    """
    counts = [int(np.ceil((high - low) / pitch_mm)) + 4 for low, high in reversed(FIELD_OF_VIEW_MM)]
    values = rng.standard_normal(counts, dtype=np.float32)
    for axis, (coordinates, (low, _)) in enumerate(zip(grid.axes, reversed(FIELD_OF_VIEW_MM), strict=True)):
        position = (coordinates - low) / pitch_mm
        base = np.floor(position).astype(int)
        t = (position - base).astype(np.float32)
        weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
        shape = [1, 1, 1]
        shape[axis] = -1
        values = sum(
            weight.reshape(shape) * np.take(values, base + offset, axis=axis) for offset, weight in enumerate(weights)
        )
    # the variance of a cubic B-spline sum of unit white noise, averaged over one cell, is 151/315 per axis
    return values / np.float32((151 / 315) ** 1.5)


def distance_to_zero(rng: np.random.Generator, grid: Grid, pitch_mm: float, *, least_slope: float) -> np.ndarray:
    """Distance in mm to the zero surface of a smooth random field, whose slope per mm counts as at least so much."""
    noise = smooth_noise(rng, grid, pitch_mm)
    gradient = np.gradient(noise, grid.spacing)
    slope = np.sqrt(gradient[0] ** 2 + gradient[1] ** 2 + gradient[2] ** 2)
    return np.abs(noise) / np.maximum(slope, np.float32(least_slope))
