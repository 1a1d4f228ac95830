"""Healthy brains as soft tissue maps: procedural ones that need no file, and warped copies of the MNI152 atlas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.phantom.fields import Grid, distance_to_zero, smooth_noise

ANATOMIES = ("procedural", "mni")

WARP_SD_MM = 3.2
WARP_PITCH_MM = 32.0
CORTEX_MM = 2.8
SULCUS_HALF_WIDTH_MM = 0.6


@dataclass
class Anatomy:
    """A healthy brain. The maps have shape (z, y, x), lie in [0, 1] and sum to 1 inside the brain."""

    grid: Grid
    wm: np.ndarray
    gm: np.ndarray
    csf: np.ndarray
    brain: np.ndarray
    """bool; images are exactly 0 outside"""
    depth: np.ndarray
    """distance to the brain's outer surface in mm, 0 outside"""
    supratentorial: np.ndarray
    """bool; where a glioma may start"""

    @property
    def ventricles(self) -> np.ndarray:
        """bool; cerebrospinal fluid far from the surface."""
        return (self.csf > 0.5) & (self.depth > 24.0)


def make_anatomy(kind: str, grid: Grid, rng: np.random.Generator) -> Anatomy:
    """Draw pose, warp and folding of one brain.

    `kind` is ``"procedural"`` (ellipsoids, sheets of noise as sulci) or ``"mni"`` (the MNI152 2009a tissue maps that
    nilearn ships).
    """
    # the MNI152 average is larger than a brain usually is
    make, shrink = {"procedural": (_procedural, 1.03), "mni": (_atlas, 1.08)}[kind]
    z, y, x = _pose(grid, rng, shrink)
    wm, gm, csf, brain, supratentorial = make(grid, rng, z, y, x)
    depth = ndimage.distance_transform_edt(brain).astype(np.float32) * np.float32(grid.spacing)
    return Anatomy(grid, wm, gm, csf, brain, depth, supratentorial)


def _pose(grid: Grid, rng: np.random.Generator, shrink: float) -> list[np.ndarray]:
    """Coordinates in the template, in mm, of every voxel: left/right flip, scale, rotation and a smooth warp."""
    scale = shrink * rng.uniform(0.96, 1.06, 3)
    angles = np.deg2rad(rng.normal(0.0, 3.0, 3))
    flip = rng.choice([-1.0, 1.0])
    matrix = np.eye(3)
    for (i, j), angle in zip(((1, 2), (0, 2), (0, 1)), angles, strict=True):
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    matrix = (matrix * scale).astype(np.float32)
    matrix[:, 2] *= np.float32(flip)
    center = (4.0, -16.0, 0.0)
    zyx = [axis - np.float32(c) for axis, c in zip(grid.zyx, center, strict=True)]
    pose = []
    for row, c in zip(matrix, center, strict=True):
        warp = smooth_noise(rng, grid, WARP_PITCH_MM) * np.float32(WARP_SD_MM)
        pose.append(warp + row[0] * zyx[0] + row[1] * zyx[1] + row[2] * zyx[2] + np.float32(c))
    return pose


def _ellipsoid(z, y, x, center, radii) -> np.ndarray:
    """Approximate signed distance in mm to an ellipsoid's surface, positive inside. Center and radii are (x, y, z)."""
    px, py, pz = ((value - np.float32(c)) / np.float32(r) for value, c, r in zip((x, y, z), center, radii, strict=True))
    norm = np.sqrt(px * px + py * py + pz * pz) + np.float32(1e-6)
    slope = np.sqrt((px / radii[0]) ** 2 + (py / radii[1]) ** 2 + (pz / radii[2]) ** 2) + np.float32(1e-6)
    return (norm * (1 - norm) / slope).astype(np.float32)


def _inside(distance: np.ndarray, spacing: float) -> np.ndarray:
    """Fraction of a voxel inside a surface at a signed distance (positive inside)."""
    return np.clip(distance / np.float32(spacing) + np.float32(0.5), 0, 1)


def _sheet(distance: np.ndarray, half_width: float, spacing: float) -> np.ndarray:
    """Fraction of a voxel covered by a sheet whose middle is at an unsigned distance."""
    half = np.float32(0.5 * spacing)
    overlap = np.minimum(distance + half, half_width) - np.maximum(distance - half, -half_width)
    return np.clip(overlap / np.float32(spacing), 0, 1)


def _limited(sheet: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Distance to a sheet that ends where `beyond` (mm) becomes positive."""
    return np.sqrt(sheet * sheet + np.maximum(beyond, 0) ** 2)


def _folds(rng: np.random.Generator, grid: Grid, pitch_mm: float) -> np.ndarray:
    """Distance in mm to winding sheets, used as the middle of sulci."""
    return distance_to_zero(rng, grid, pitch_mm, least_slope=0.3 / pitch_mm)


def _procedural(grid: Grid, rng: np.random.Generator, z, y, x):
    h = grid.spacing
    ax = np.abs(x)

    # outlines: cerebrum with a flat rear base, cerebellum below it, brain stem
    tentorium = z + 2.0 + 0.4 * ax + 1.0 * np.maximum(y + 30.0, 0)
    upper = _ellipsoid(z, y, x, (0, -17, 6), (66, 86, 70))
    lower = _ellipsoid(z, y, x, (0, -17, 6), (66, 86, 44))
    cerebrum = np.minimum(np.where(z > 6, upper, lower), 0.8 * tentorium)
    cerebellum = np.minimum(_ellipsoid(z, y, x, (0, -60, -32), (54, 33, 32)), -0.8 * tentorium - 1.0)
    stem = np.minimum(_ellipsoid(z, y, x, (0, -28, -36), (14, 15, 42)), z + 70.0)
    outline = np.maximum(np.maximum(cerebrum, cerebellum), stem)
    brain = ndimage.binary_fill_holes(outline > -1.5)

    # cerebrospinal fluid sheets with cortex on both sides: folds, the gap between the hemispheres, the lateral fissure
    depth_limit = 17.0 + 4.0 * smooth_noise(rng, grid, 30.0)
    folds = _limited(_folds(rng, grid, 9.0), cerebrum - depth_limit)
    folds = np.minimum(folds, _limited(_folds(rng, grid, 7.5), cerebrum - 0.6 * depth_limit))
    arch = np.sqrt(((y + 10.0) / 46.0) ** 2 + ((z - 2.0) / 25.0) ** 2)
    midline = _limited(ax, 25.0 * (1.0 - arch))
    lateral = _limited(np.abs(z + 4.0 + 0.3 * y), np.maximum(37.0 - ax, np.abs(y + 8.0) - 32.0))
    csf = np.maximum(1 - _inside(cerebrum, h), _sheet(folds, SULCUS_HALF_WIDTH_MM, h))
    csf = np.maximum(csf, _sheet(midline, 1.0, h))
    csf = np.maximum(csf, _sheet(lateral, 1.8, h))
    cortex = np.maximum(1 - _inside(cerebrum - CORTEX_MM, h), _sheet(folds, SULCUS_HALF_WIDTH_MM + CORTEX_MM, h))
    cortex = np.maximum(cortex, _sheet(midline, 1.0 + CORTEX_MM, h))
    cortex = np.maximum(cortex, _sheet(lateral, 1.8 + CORTEX_MM, h))

    # deep gray matter and ventricles
    for center, radii in (((12, -18, 8), (9, 14, 9)), ((25, 4, 2), (7, 17, 11)), ((14, 16, 9), (6, 11, 10))):
        cortex = np.maximum(cortex, _inside(_ellipsoid(z, y, ax, center, radii), h))
    ventricle_size = rng.uniform(0.8, 1.25)
    for center, full in (
        ((9, -2, 20), (5, 30, 7)),
        ((20, -36, 14), (6, 12, 10)),
        ((31, -22, -12), (4, 15, 4)),
        ((0, -12, 2), (2.5, 12, 8)),
        ((0, -44, -32), (6, 6, 9)),
    ):
        scaled = tuple(ventricle_size * radius for radius in full)
        csf = np.maximum(csf, _inside(_ellipsoid(z, y, ax, center, scaled), h))

    # below the tentorium: fine folia around white matter
    folia = _folds(rng, grid, 7.0)
    low_csf = np.maximum(1 - _inside(cerebellum, h), 0.8 * _sheet(_limited(folia, cerebellum - 8.0), 0.4, h))
    low_cortex = np.maximum(1 - _inside(cerebellum - 6.0, h), _sheet(_limited(folia, cerebellum - 14.0), 2.0, h))
    in_stem = _inside(stem, h)
    low_csf = low_csf * (1 - in_stem)
    low_cortex = low_cortex * (1 - in_stem)
    below = tentorium < 0
    csf = np.where(below, np.maximum(low_csf, csf * (cerebrum > 0)), csf * (1 - in_stem * (tentorium < 4)))
    cortex = np.where(below, low_cortex, cortex)

    csf = np.where(brain, csf, 0).astype(np.float32)
    gm = np.where(brain, np.clip(cortex - csf, 0, 1 - csf), 0).astype(np.float32)
    wm = np.where(brain, np.maximum(1 - csf - gm, 0), 0).astype(np.float32)
    return wm, gm, csf, brain, tentorium > 6.0


@lru_cache(maxsize=1)
def _load_atlas(spacing: float) -> tuple[list[np.ndarray], np.ndarray]:
    """White matter, gray matter and brain on the 1 mm atlas grid (z, y, x), and the matrix from mm to its indices."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise InputError(
            "anatomy 'mni' needs nilearn, which is not installed. Install it (pip install nnunetv2_mstkd[demo]) "
            "or use anatomy 'procedural'"
        ) from error
    loaders = datasets.load_mni152_wm_template, datasets.load_mni152_gm_template, datasets.load_mni152_brain_mask
    images = [load(resolution=1) for load in loaders]
    wm, gm, brain = (np.ascontiguousarray(np.asarray(image.dataobj, dtype=np.float32).T) for image in images)
    brain = ndimage.binary_fill_holes(brain > 0.5)
    # blur to the voxel size before sampling, so that coarse voxels mix tissues instead of picking one
    sigma = 0.4 * np.sqrt(spacing**2 - 1.0)
    maps = [ndimage.gaussian_filter(m, sigma, truncate=3.0) if sigma else m for m in (wm, gm, brain.astype(np.float32))]
    return maps, np.linalg.inv(images[0].affine).astype(np.float32)


def _atlas(grid: Grid, rng: np.random.Generator, z, y, x):
    maps, to_index = _load_atlas(grid.spacing)
    index = [to_index[i, 0] * x + to_index[i, 1] * y + to_index[i, 2] * z + to_index[i, 3] for i in (2, 1, 0)]
    wm, gm, coverage = (ndimage.map_coordinates(source, index, order=1, mode="constant") for source in maps)
    brain = ndimage.binary_fill_holes(coverage > 0.5)
    # an average of 152 heads has blurred borders and hardly any sulci: sharpen all maps and favor fluid
    powered = wm**1.5, 0.85 * gm**1.5, 1.5 * np.clip(1 - wm - gm, 0, 1) ** 1.5
    total = np.maximum(sum(powered), np.float32(1e-6))
    wm, gm = (np.where(brain, part / total, 0).astype(np.float32) for part in powered[:2])
    csf = np.where(brain, np.maximum(1 - wm - gm, 0), 0).astype(np.float32)
    supratentorial = (z > -14.0 - 1.2 * np.maximum(y + 30.0, 0)) & (z > -30.0)
    return wm, gm, csf, brain, supratentorial
