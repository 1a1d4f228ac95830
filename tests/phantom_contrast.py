"""Contrast of the phantom, to compare with real images: one area under the ROC curve per task and modality."""

from __future__ import annotations

import numpy as np

from nnunetv2_mstkd.phantom.case import Case
from nnunetv2_mstkd.phantom.recipe import LABELS

TASKS = ("WT vs healthy", "TC vs rest of brain", "ET vs rest of brain", "ET vs rest of WT", "NCR vs ED")

REFERENCE = {
    "WT vs healthy": (0.46, 0.54, 0.82, 0.95),
    "TC vs rest of brain": (0.47, 0.72, 0.83, 0.97),
    "ET vs rest of brain": (0.54, 0.95, 0.77, 0.97),
    "ET vs rest of WT": (0.61, 0.95, 0.45, 0.66),
    "NCR vs ED": (0.35, 0.49, 0.78, 0.65),
}
"""Target mean AUC of the default recipe on T1, T1ce, T2 and FLAIR."""


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive value exceeds a negative one, ties counted half; exact, for non-negative integers.

    Returns NaN if either sample is empty.
    """
    if positive.size == 0 or negative.size == 0:
        return float("nan")
    length = int(max(positive.max(), negative.max())) + 1
    positive_counts = np.bincount(positive, minlength=length).astype(np.float64)
    negative_counts = np.bincount(negative, minlength=length).astype(np.float64)
    below = np.cumsum(negative_counts) - negative_counts
    return float((positive_counts * (below + 0.5 * negative_counts)).sum() / positive.size / negative.size)


def contrast_table(case: Case) -> dict[str, tuple[float, ...]]:
    """Univariate voxel AUC of every task on every modality of one case; NaN where the case lacks a region."""
    label = case.label
    brain = case.images[0] > 0
    whole = label > 0
    enhancing = label == LABELS["enhancing"]
    core = enhancing | (label == LABELS["necrosis"])
    pairs = {
        "WT vs healthy": (whole, brain & ~whole),
        "TC vs rest of brain": (core, brain & ~core),
        "ET vs rest of brain": (enhancing, brain & ~enhancing),
        "ET vs rest of WT": (enhancing, whole & ~enhancing),
        "NCR vs ED": (label == LABELS["necrosis"], label == LABELS["edema"]),
    }
    return {
        task: tuple(auc(image[positive], image[negative]) for image in case.images)
        for task, (positive, negative) in pairs.items()
    }
