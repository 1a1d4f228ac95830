"""The numbers of the phantom: tissue means, variability, noise and the shape of the lesions, per named recipe.

The means started as medians over six public BraTS cases, relative to white matter (four of them with masks of an
algorithm), and were then adjusted, within the range of those cases, until the phantom met the contrast table in
``tests/phantom_contrast.py``. That table is therefore a fit, not a blind test. The numbers describe a contrast pattern
(which modality shows which region), not a patient population.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nnunetv2_mstkd.errors import InputError

MODALITIES = ("T1", "T1ce", "T2", "FLAIR")
"""Channel order of every phantom image and of its dataset.json."""

LABELS = {"background": 0, "edema": 1, "necrosis": 2, "enhancing": 3}
"""Integer labels of the phantom; "necrosis" is the whole non-enhancing core (NCR and NET, as in BraTS)."""

REGIONS = {"whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)}
"""Maps each region to its labels, in the nesting order of nnU-Net's regions_class_order (1, 2, 3)."""

CLASSES = ("WM", "GM", "CSF", "ED", "NCR", "NET", "ET")
"""Tissue classes of the intensity model. NCR and NET share one label but not one appearance."""


@dataclass(frozen=True)
class Recipe:
    """All numbers of one phantom recipe. Intensities are relative to white matter, lengths in mm, volumes in ml."""

    name: str

    # intensities: class -> (T1, T1ce, T2, FLAIR)
    means: dict[str, tuple[float, float, float, float]] = field(
        default_factory=lambda: {
            "WM": (1.00, 1.00, 1.00, 1.00),
            "GM": (0.86, 0.87, 1.30, 1.15),
            "CSF": (0.58, 0.62, 2.20, 0.74),
            "ED": (0.82, 0.79, 1.92, 1.86),
            "NCR": (0.81, 0.78, 2.19, 1.75),
            "NET": (0.84, 0.82, 1.92, 1.66),
            "ET": (0.92, 1.80, 1.62, 1.78),
        }
    )
    # standard deviation inside one case and class
    texture: dict[str, tuple[float, float, float, float]] = field(
        default_factory=lambda: {
            "WM": (0.03, 0.03, 0.05, 0.05),
            "GM": (0.04, 0.04, 0.08, 0.07),
            "CSF": (0.05, 0.05, 0.15, 0.08),
            "ED": (0.10, 0.13, 0.32, 0.30),
            "NCR": (0.08, 0.15, 0.38, 0.35),
            "NET": (0.09, 0.14, 0.32, 0.30),
            "ET": (0.11, 0.40, 0.30, 0.28),
        }
    )
    # relative standard deviation of a class mean between cases
    case_jitter: dict[str, tuple[float, float, float, float]] = field(
        default_factory=lambda: {
            "WM": (0.00, 0.00, 0.00, 0.00),
            "GM": (0.05, 0.05, 0.06, 0.06),
            "CSF": (0.10, 0.10, 0.10, 0.08),
            "ED": (0.04, 0.04, 0.08, 0.08),
            "NCR": (0.05, 0.08, 0.08, 0.08),
            "NET": (0.05, 0.08, 0.08, 0.08),
            "ET": (0.06, 0.20, 0.08, 0.08),
        }
    )
    rician_sigma: tuple[float, float, float, float] = (0.018, 0.030, 0.048, 0.045)
    bias_amplitude: tuple[float, float, float, float] = (0.05, 0.10, 0.14, 0.14)
    gamma: tuple[float, float] = (0.90, 1.12)
    thick_slice_probability: float = 0.30

    # tumor
    volume_median_ml: float = 75.0
    volume_log_sd: float = 0.6
    volume_range_ml: tuple[float, float] = (12.0, 220.0)
    core_fraction: tuple[float, float] = (0.18, 0.55)
    rim_mm: tuple[float, float] = (2.4, 6.4)
    rim_fill_minimum: float = 0.75
    """enhancing share of the voxels of a rim that is much thinner than a voxel"""
    rim_gap_fraction: tuple[float, float] = (0.05, 0.30)
    no_enhancement_probability: float = 0.12
    front_density: float = 0.6
    infiltration_gm: float = 0.25
    """share of the edema signal in gray matter; it is 1 in white matter"""

    # look-alikes
    vessel_radius_mm: float = 1.0
    vessel_fields: int = 2
    vessel_t1ce: float = 1.9
    periventricular: tuple[float, float] = (0.0, 0.6)


DEFAULT = Recipe("default")

HARD = replace(
    DEFAULT,
    name="hard",
    case_jitter={**DEFAULT.case_jitter, "ET": (0.09, 0.30, 0.12, 0.12)},
    rim_mm=(1.0, 2.4),
    rim_fill_minimum=0.65,
    vessel_radius_mm=1.3,
    vessel_fields=5,
)
"""Enhancing tumor is harder to find on T1ce: it varies more, its rim is thin, and vessels are dense."""

RECIPES = {recipe.name: recipe for recipe in (DEFAULT, HARD)}


def get_recipe(name: str) -> Recipe:
    """Look up a recipe by name; ValueError names the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown phantom recipe {name!r}; known recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
