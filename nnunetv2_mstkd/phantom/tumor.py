"""A glioma in a healthy brain: anisotropic growth, core, enhancing rim, necrosis, mass effect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunetv2_mstkd.phantom.anatomy import Anatomy
from nnunetv2_mstkd.phantom.fields import Grid, smooth_noise
from nnunetv2_mstkd.phantom.recipe import LABELS, Recipe

DIFFUSION_RATIO = 10.0
"""Tumor cells diffuse this much faster in white than in gray matter."""


@dataclass
class Tumor:
    """A tumor on the grid of its anatomy, arrays of shape (z, y, x)."""

    label: np.ndarray
    """uint8, values as in recipe.LABELS"""
    net: np.ndarray
    """bool; the solid part (NET) of the label "necrosis"; the rest is fluid (NCR)"""
    density: np.ndarray
    """float32; cell density, 1 in the middle of the whole tumor and `Recipe.front_density` at its border"""
    rim_fill: np.ndarray
    """float32; fraction of an enhancing voxel that enhances, below 1 where the rim is thinner than a voxel"""


def grow_tumor(anatomy: Anatomy, recipe: Recipe, rng: np.random.Generator) -> Tumor:
    """Grow one tumor and move the tissue around it (the maps of `anatomy` are changed in place).

    The front of the Fisher-Kolmogorov equation ``dc/dt = div(D grad c) + rho c (1 - c)`` travels with speed
    ``2 sqrt(D rho)``, so the time at which it arrives solves ``|grad T| sqrt(D) = const`` (the traveling-time
    formulation of Konukoglu et al., "Image guided personalization of reaction-diffusion type tumor growth models", IEEE
    TMI 29, 2010). That equation is solved by fast marching with D(WM) : D(GM) = 10 : 1 and D(CSF) = 0; the whole tumor
    is the level set of the wanted volume. Labels are nested (core inside the whole tumor) and inside the brain.
    """
    grid = anatomy.grid
    volume_ml = float(
        np.clip(recipe.volume_median_ml * np.exp(recipe.volume_log_sd * rng.standard_normal()), *recipe.volume_range_ml)
    )
    core_fraction = rng.uniform(*recipe.core_fraction)
    rim_mm = rng.uniform(*recipe.rim_mm)
    gap_fraction = rng.uniform(*recipe.rim_gap_fraction)
    ncr_fraction = rng.uniform(0.3, 0.95)
    enhances = rng.uniform() >= recipe.no_enhancement_probability
    mass_effect = rng.uniform(0.0, 0.35)

    seed = _seed_voxel(anatomy, rng)
    whole, arrival = _whole_tumor(anatomy, seed, volume_ml, rng)
    core = _core(grid, whole, arrival, seed, core_fraction, rng)
    progress = np.clip(arrival / max(float(arrival[whole].max()), grid.spacing), 0, 1)
    density = (1 - (1 - recipe.front_density) * progress**2).astype(np.float32)

    label = np.zeros(grid.shape, np.uint8)
    label[whole] = LABELS["edema"]
    label[core] = LABELS["necrosis"]
    rim_fill = np.ones(grid.shape, np.float32)
    solid = smooth_noise(rng, grid, 7.0)
    gaps = smooth_noise(rng, grid, 9.0)
    thickness = rim_mm * np.clip(1.0 + 0.35 * smooth_noise(rng, grid, 12.0), 0.4, 2.0)
    if enhances:
        # the first voxel layer has distance 1 voxel, its middle lies half a voxel inside the surface
        inward = (ndimage.distance_transform_edt(core) - 0.5) * grid.spacing
        rim = core & (inward <= np.maximum(thickness, 0.5 * grid.spacing + 1e-3))
        rim &= gaps > np.quantile(gaps[rim], gap_fraction)
        label[rim] = LABELS["enhancing"]
        rim_fill = np.clip((thickness - inward) / grid.spacing + 0.5, recipe.rim_fill_minimum, 1.0).astype(np.float32)
    inside = label == LABELS["necrosis"]
    net = inside & (solid > np.quantile(solid[inside], ncr_fraction)) if inside.any() else inside
    _push_tissue(anatomy, whole, mass_effect)
    return Tumor(label, net, density, rim_fill)


def _seed_voxel(anatomy: Anatomy, rng: np.random.Generator) -> tuple[int, int, int]:
    """Pick a deep supratentorial white-matter voxel; the points tried are in mm, independent of the voxel size."""
    axes = anatomy.grid.axes
    allowed = (anatomy.wm > 0.7) & (anatomy.depth > 14.0) & anatomy.supratentorial
    allowed &= np.abs(anatomy.grid.zyx[2]) > 10.0
    if not allowed.any():  # voxels of several mm may hold no pure white matter
        allowed = anatomy.supratentorial & (anatomy.depth > 14.0) & (anatomy.csf < 0.3)
    points = rng.uniform([axis[0] for axis in axes], [axis[-1] for axis in axes], (4096, 3))
    indices = np.rint(np.stack(anatomy.grid.to_index(*points.T), axis=1)).astype(int)
    hits = np.flatnonzero(allowed[tuple(indices.T)])
    chosen = indices[hits[0]] if len(hits) else np.argwhere(allowed)[0]
    z, y, x = (int(i) for i in chosen)
    return z, y, x


def _whole_tumor(anatomy: Anatomy, seed, volume_ml: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """The level set of the perturbed arrival time that has the wanted volume, and that time in mm of white matter."""
    grid = anatomy.grid
    speed = np.sqrt(anatomy.wm + anatomy.gm / DIFFUSION_RATIO) * (1 - anatomy.csf) ** 2
    speed[~anatomy.brain | (anatomy.csf > 0.6)] = 0
    image = sitk.GetImageFromArray(speed.astype(np.float64))
    image.SetSpacing([grid.spacing] * 3)
    marching = sitk.FastMarchingImageFilter()
    marching.AddTrialPoint([int(i) for i in reversed(seed)])
    marching.SetStoppingValue(400.0)
    arrival = np.minimum(sitk.GetArrayFromImage(marching.Execute(image)), 1e6).astype(np.float32)
    noise = 0.7 * smooth_noise(rng, grid, 14.0) + 0.5 * smooth_noise(rng, grid, 6.0)
    time = arrival * (1.0 + 0.22 * np.clip(noise, -2, 2)).astype(np.float32)
    reached = (arrival < 400.0) & (speed > 0)
    # a front that needs more than a third of the brain is cut: no glioma in the volume range does
    wanted = min(round(volume_ml / grid.voxel_ml), int(0.3 * anatomy.brain.sum()), int(reached.sum()))
    limit = np.partition(time[reached], wanted - 1)[wanted - 1]
    whole = reached & (time <= limit)
    parts, _ = ndimage.label(whole)
    return ndimage.binary_fill_holes(parts == parts[seed]), time


def _core(grid: Grid, whole, time, seed, fraction: float, rng) -> np.ndarray:
    """The innermost part of the tumor: rounder than the edema, as core tissue displaces rather than infiltrates."""
    z, y, x = grid.zyx
    center = [axis[i] for axis, i in zip(grid.axes, seed, strict=True)]
    distance = np.sqrt((z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2)
    noise = 0.7 * smooth_noise(rng, grid, 10.0) + 0.6 * smooth_noise(rng, grid, 5.0)
    score = (distance + 0.25 * np.minimum(time, 400.0)) * (1.0 + 0.22 * np.clip(noise, -2, 2))
    wanted = max(1, round(fraction * int(whole.sum())))
    limit = np.partition(score[whole], wanted - 1)[wanted - 1]
    core = whole & (score <= limit)
    parts, count = ndimage.label(core)
    if count > 1:
        core = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    return core


def _push_tissue(anatomy: Anatomy, whole: np.ndarray, strength: float) -> None:
    """Mass effect: tissue near the tumor is moved away from its middle, fading towards the skull."""
    grid = anatomy.grid
    zyx = np.nonzero(whole)
    center = [float(axis[i].mean()) for axis, i in zip(grid.axes, zyx, strict=True)]
    radius = (3 * len(zyx[0]) * grid.spacing**3 / (4 * np.pi)) ** (1 / 3)
    offsets = [axis - c for axis, c in zip(grid.zyx, center, strict=True)]
    squared = offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2
    pull = strength * np.exp(-squared / (2 * (1.2 * radius) ** 2)) * np.clip(anatomy.depth / 18.0, 0, 1)
    moving = np.nonzero(pull > 0.01)
    if len(moving[0]) == 0:
        return
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in moving)
    source = grid.to_index(*(axis + c - pull * axis for axis, c in zip(offsets, center, strict=True)))
    source = [index[box] for index in source]
    brain = anatomy.brain[box]
    for name in ("gm", "csf"):
        field = getattr(anatomy, name)
        moved = ndimage.map_coordinates(field, source, order=1, mode="nearest")
        field[box] = np.where(brain, moved, 0)
    anatomy.wm = np.where(anatomy.brain, np.maximum(1 - anatomy.gm - anatomy.csf, 0), 0).astype(np.float32)
