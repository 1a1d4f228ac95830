"""One phantom case, from a seed to images and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.phantom.anatomy import ANATOMIES, make_anatomy
from nnunetv2_mstkd.phantom.fields import Grid
from nnunetv2_mstkd.phantom.intensities import render
from nnunetv2_mstkd.phantom.recipe import REGIONS, get_recipe
from nnunetv2_mstkd.phantom.tumor import grow_tumor

SPACING_RANGE_MM = (1.0, 6.0)


@dataclass
class Case:
    """A synthetic patient."""

    images: np.ndarray
    """int16, shape (4, z, y, x): T1, T1ce, T2, FLAIR; 0 outside the brain, positive inside it, in every modality"""
    label: np.ndarray
    """uint8, shape (z, y, x): 0 background, 1 edema, 2 necrotic and non-enhancing core, 3 enhancing tumor"""
    spacing: float
    """edge of the cubic voxels in mm"""
    origin: tuple[float, float, float]
    """position (x, y, z) in mm of the first voxel; x grows to the right, y to the front, z upwards"""

    def volumes_ml(self) -> dict[str, float]:
        """Volume of each region (whole tumor, tumor core, enhancing tumor) in milliliters."""
        counts = np.bincount(self.label.ravel(), minlength=4) * self.spacing**3 / 1000.0
        return {name: float(counts[list(labels)].sum()) for name, labels in REGIONS.items()}


def make_case(seed: int, *, spacing: float = 2.0, recipe: str = "default", anatomy: str = "procedural") -> Case:
    """Make one synthetic patient.

    Parameters
    ----------
    seed
        Non-negative integer of any size; the same arguments give the same case, bit for bit with the same versions of
        numpy, scipy and SimpleITK. One seed at two spacings gives nearly the same patient, with different noise.
    spacing
        Edge of the cubic voxels in mm, 1 to 6.
    recipe
        ``"default"`` or ``"hard"``.
    anatomy
        ``"procedural"`` or ``"mni"`` (needs nilearn).

    Notes
    -----
    Arrays are in SimpleITK order (z, y, x). A phantom reproduces which modality shows which region; numbers measured on
    it say nothing about clinical performance.
    """
    check_arguments(spacing=spacing, recipe=recipe, anatomy=anatomy, seed=seed)
    numbers = get_recipe(recipe)
    # separate streams: a change in one stage, such as the number of vessels, does not affect the draws of the others
    for_anatomy, for_tumor, for_images = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    grid = Grid(float(spacing))
    brain = make_anatomy(anatomy, grid, for_anatomy)
    tumor = grow_tumor(brain, numbers, for_tumor)
    images = render(brain, tumor, numbers, for_images)
    return Case(images, tumor.label, float(spacing), grid.origin)


def check_arguments(*, spacing: float, recipe: str, anatomy: str, seed: int) -> None:
    """Raise ValueError if an argument of :func:`make_case` is out of range."""
    low, high = SPACING_RANGE_MM
    if not low <= spacing <= high:
        raise InputError(f"spacing must be between {low:g} and {high:g} mm, found {spacing:g}")
    get_recipe(recipe)
    if anatomy not in ANATOMIES:
        raise InputError(f"unknown phantom anatomy {anatomy!r}; known anatomies: {', '.join(ANATOMIES)}")
    if seed < 0:
        raise InputError(f"seed must not be negative, found {seed}")
