"""From tissue maps and a tumor to four magnetic resonance contrasts."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from nnunetv2_mstkd.phantom.anatomy import Anatomy
from nnunetv2_mstkd.phantom.fields import distance_to_zero, smooth_noise
from nnunetv2_mstkd.phantom.recipe import CLASSES, LABELS, MODALITIES, Recipe
from nnunetv2_mstkd.phantom.tumor import Tumor

WM_LEVEL = 1000.0
"""Stored value of white matter before the random gain."""


def render(anatomy: Anatomy, tumor: Tumor, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Render T1, T1ce, T2 and FLAIR of one case: int16, shape (4, z, y, x).

    Exactly 0 outside the brain and at least 1 inside, in every modality.
    """
    grid = anatomy.grid
    maps = soft_classes(anatomy, tumor, recipe)
    means = _case_means(recipe, rng)
    vessels = _vessels(anatomy, tumor, recipe, rng)
    halo = _periventricular(anatomy, tumor, recipe, rng)
    choroid = _choroid(anatomy, rng)

    # texture: half of its variance is shared by the modalities, as free water brightens T2 and darkens T1
    shared = smooth_noise(rng, grid, 9.0)
    images = np.zeros((len(MODALITIES), *grid.shape), np.int16)
    for channel in range(len(MODALITIES)):
        own = 0.8 * smooth_noise(rng, grid, 7.0) + 0.6 * smooth_noise(rng, grid, 2.5)
        water_sign = -1.0 if MODALITIES[channel] in ("T1", "T1ce") else 1.0
        texture = np.float32(0.7 * water_sign) * shared + np.float32(0.7) * own
        image = np.zeros(grid.shape, np.float32)
        spread = np.zeros(grid.shape, np.float32)
        for name in CLASSES:
            image += np.float32(means[name][channel]) * maps[name]
            spread += np.float32(recipe.texture[name][channel]) * maps[name]
        image += spread * texture
        if MODALITIES[channel] == "T1ce":
            image += vessels * np.maximum(recipe.vessel_t1ce - image, 0) + 0.9 * choroid
        elif MODALITIES[channel] == "T2":
            image += 0.45 * halo - 0.3 * vessels * image
        elif MODALITIES[channel] == "FLAIR":
            image += halo
        images[channel] = _acquire(image, anatomy, recipe, channel, rng)
    return images


def soft_classes(anatomy: Anatomy, tumor: Tumor, recipe: Recipe) -> dict[str, np.ndarray]:
    """Mix tumor and healthy tissue: blurred class maps that sum to 1 inside the brain.

    Edema replaces white matter fully but gray matter only in part (`Recipe.infiltration_gm`), as it spares the cortex.
    """
    sigma = float(np.clip(1.2 / anatomy.grid.spacing, 0.4, 1.0))
    label = tumor.label
    enhancing = (label == LABELS["enhancing"]) * tumor.rim_fill
    unfilled = (label == LABELS["enhancing"]) - enhancing
    parts = {
        "ED": (label == LABELS["edema"]).astype(np.float32),
        "NCR": ((label == LABELS["necrosis"]) & ~tumor.net).astype(np.float32),
        "NET": tumor.net + unfilled.astype(np.float32),
        "ET": enhancing.astype(np.float32),
    }
    parts = {name: ndimage.gaussian_filter(part, sigma, truncate=3.0) for name, part in parts.items()}
    tissue = np.maximum(anatomy.wm + anatomy.gm, np.float32(1e-3))
    parts["ED"] *= tumor.density * (anatomy.wm + recipe.infiltration_gm * anatomy.gm) / tissue
    total = sum(parts.values())
    parts = {name: np.where(anatomy.brain, part / np.maximum(total, 1), 0) for name, part in parts.items()}
    healthy = np.clip(1 - total, 0, 1)
    return {"WM": anatomy.wm * healthy, "GM": anatomy.gm * healthy, "CSF": anatomy.csf * healthy, **parts}


def _case_means(recipe: Recipe, rng: np.random.Generator) -> dict[str, list[float]]:
    """Class means of one case. T1 and T1ce share most of their deviation, as contrast agent changes ET alone."""
    means = {}
    for name in CLASSES:
        deviation = rng.standard_normal(len(MODALITIES))
        if name != "ET":
            deviation[1] = 0.8 * deviation[0] + 0.6 * deviation[1]
        factor = np.exp(np.array(recipe.case_jitter[name]) * np.clip(deviation, -2.5, 2.5))
        means[name] = [float(mean * f) for mean, f in zip(recipe.means[name], factor, strict=True)]
    return means


def _vessels(anatomy: Anatomy, tumor: Tumor, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Fraction of each voxel in contrast-filled vessels: curves on which two smooth fields vanish, near fluid."""
    grid = anatomy.grid
    vessels = np.zeros(grid.shape, np.float32)
    for _ in range(recipe.vessel_fields):
        squared = np.zeros(grid.shape, np.float32)
        for _ in range(2):
            squared += distance_to_zero(rng, grid, 11.0, least_slope=0.03) ** 2
        distance = np.sqrt(squared)
        # cross-section: area of the tube over area of the voxel where the tube is thinner than a voxel
        cover = np.clip((recipe.vessel_radius_mm - distance) / grid.spacing + 0.5, 0, 1)
        area = min(1.0, np.pi * recipe.vessel_radius_mm**2 / grid.spacing**2)
        vessels = np.maximum(vessels, cover * np.float32(max(area, 0.25)))
    near = np.clip(1.6 * ndimage.gaussian_filter(anatomy.csf, 2.0 / grid.spacing), 0, 1)
    # the sinus along the upper midline
    z, _, x = grid.zyx
    middle = np.clip((3.0 - np.abs(x)) / grid.spacing + 0.5, 0, 1) * (z > 20)
    sinus = middle * np.clip((6.0 - anatomy.depth) / 3.0, 0, 1)
    return np.where(anatomy.brain & (tumor.label == 0), np.maximum(vessels * near, 0.7 * sinus), 0).astype(np.float32)


def _periventricular(anatomy: Anatomy, tumor: Tumor, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Brightness around the ventricles on FLAIR, as is common with age."""
    strength = rng.uniform(*recipe.periventricular)
    noise = smooth_noise(rng, anatomy.grid, 8.0)
    ventricles = anatomy.ventricles
    if not ventricles.any():
        return np.zeros(anatomy.grid.shape, np.float32)
    distance = ndimage.distance_transform_edt(~ventricles) * anatomy.grid.spacing
    halo = np.exp(-0.5 * (distance / 3.0) ** 2) * np.clip(0.6 + 0.6 * noise, 0, 1.5) * anatomy.wm
    return np.where(tumor.label == 0, strength * halo, 0).astype(np.float32)


def _choroid(anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
    """Fraction of each ventricle voxel in the enhancing choroid plexus."""
    noise = smooth_noise(rng, anatomy.grid, 6.0)
    return (np.clip(noise - 0.8, 0, 1) * anatomy.csf * anatomy.ventricles).astype(np.float32)


def _acquire(image: np.ndarray, anatomy: Anatomy, recipe: Recipe, channel: int, rng: np.random.Generator) -> np.ndarray:
    """Effects of a scanner and its software: gamma, coil bias, thick slices, Rician noise, gain, skull stripping."""
    grid = anatomy.grid
    gamma = rng.uniform(*recipe.gamma)
    bias = recipe.bias_amplitude[channel] * np.clip(smooth_noise(rng, grid, 70.0), -2, 2) / 1.5
    thick = rng.uniform() < recipe.thick_slice_probability
    thick_axis = int(rng.integers(3))
    slice_mm = rng.uniform(3.0, 5.0)
    gain = rng.uniform(0.6, 1.8)
    image = np.maximum(image, np.float32(0.02)) ** np.float32(gamma) * (1 + bias)
    if thick:
        # full width at half maximum of the slice profile; the Gaussian is renormalized at the border of the brain
        sigma = slice_mm / 2.355 / grid.spacing
        inside = anatomy.brain.astype(np.float32)
        weight = ndimage.gaussian_filter1d(inside, sigma, axis=thick_axis)
        image = ndimage.gaussian_filter1d(image * inside, sigma, axis=thick_axis) / np.maximum(weight, 1e-3)
    noise = rng.standard_normal((2, *grid.shape), dtype=np.float32) * np.float32(recipe.rician_sigma[channel])
    image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)
    stored = np.clip(np.rint(image * np.float32(WM_LEVEL * gain)), 1, np.iinfo(np.int16).max)
    return np.where(anatomy.brain, stored, 0).astype(np.int16)
