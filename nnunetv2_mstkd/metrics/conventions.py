"""The metrics by name, their values for empty masks, and the lesion-wise rules of BraTS.

Published numbers differ by these conventions more often than by their methods, so each convention is defined in exactly
one table, and :func:`empty_rules_text` describes the one in use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nnunetv2_mstkd.errors import InputError

DICE = "dice"
IOU = "iou"
HD95 = "hd95"
NSD = "nsd"
SENSITIVITY = "sensitivity"
PRECISION = "precision"
VOLUME_ERROR = "volume_error_ml"
RELATIVE_VOLUME_ERROR = "relative_volume_error"
LESION_DICE = "lesion_dice"
LESION_HD95 = "lesion_hd95"


class Metric(NamedTuple):
    """A metric's name in tables, its unit, which direction is better, and the range of its values."""

    label: str
    unit: str
    """``"%"`` for fractions, which are printed times 100."""
    better: int
    """+1: higher is better; -1: lower is better; 0: closer to zero is better."""
    lowest: float
    highest: float

    @property
    def factor(self) -> int:
        """Turns values into the printed unit."""
        return 100 if self.unit == "%" else 1


METRICS: Mapping[str, Metric] = {
    DICE: Metric("Dice", "%", +1, 0.0, 1.0),
    IOU: Metric("IoU", "%", +1, 0.0, 1.0),
    HD95: Metric("HD95", "mm", -1, 0.0, math.inf),
    NSD: Metric("NSD", "%", +1, 0.0, 1.0),
    SENSITIVITY: Metric("sensitivity", "%", +1, 0.0, 1.0),
    PRECISION: Metric("precision", "%", +1, 0.0, 1.0),
    VOLUME_ERROR: Metric("volume error", "ml", 0, -math.inf, math.inf),
    RELATIVE_VOLUME_ERROR: Metric("relative volume error", "%", 0, -1.0, math.inf),
    LESION_DICE: Metric("lesion-wise Dice", "%", +1, 0.0, 1.0),
    LESION_HD95: Metric("lesion-wise HD95", "mm", -1, 0.0, math.inf),
}


def metric_named(name: str) -> Metric:
    """Look up a metric; an unknown name is an InputError that lists the known ones."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}; known are {', '.join(METRICS)}")
    return METRICS[name]


# ---- empty masks ---------------------------------------------------------------------------------------------------

LEFT_OUT = math.nan
"""The case has no value and is excluded from every mean."""

DIAGONAL = "the image diagonal"
PENALTY = "the penalty"
FORMULA = "as computed"


class EmptyRule(NamedTuple):
    """The value of a metric for empty masks: a number, :data:`LEFT_OUT`, or one of the three words above."""

    both: float | str
    """Both masks are empty (lesion-wise: there is nothing to score)."""
    prediction: float | str
    """Only the prediction is empty: everything was missed (lesion-wise: a missed lesion)."""
    reference: float | str
    """Only the reference is empty: the whole prediction is false (lesion-wise: a false lesion)."""


class Convention(NamedTuple):
    """A set of rules for empty masks and its source."""

    source: str
    rules: Mapping[str, EmptyRule]


BRATS = "brats"
NNUNET = "nnunet"

CONVENTIONS: Mapping[str, Convention] = {
    # HD95: 373.12866 in BraTS is the diagonal of 240 x 240 x 155 voxels of 1 mm; the diagonal suits other images.
    # Sensitivity and NSD as in the code of BraTS 2023 and 2024; precision, which BraTS has not, by symmetry.
    BRATS: Convention(
        "BraTS 2018-2022; Dice as in the missing-modality literature, whose epsilon gives 1 for two empty masks",
        {
            DICE: EmptyRule(1.0, 0.0, 0.0),
            IOU: EmptyRule(1.0, 0.0, 0.0),
            HD95: EmptyRule(0.0, DIAGONAL, DIAGONAL),
            NSD: EmptyRule(1.0, 0.0, 0.0),
            SENSITIVITY: EmptyRule(1.0, 0.0, 0.0),
            PRECISION: EmptyRule(1.0, 0.0, 0.0),
            VOLUME_ERROR: EmptyRule(FORMULA, FORMULA, FORMULA),
            RELATIVE_VOLUME_ERROR: EmptyRule(0.0, FORMULA, LEFT_OUT),
        },
    ),
    NNUNET: Convention(
        "nnU-Net 2 (Dice) and nnU-Net 1 (the others): NaN, dropped by nanmean",
        {
            DICE: EmptyRule(LEFT_OUT, 0.0, 0.0),
            IOU: EmptyRule(LEFT_OUT, 0.0, 0.0),
            HD95: EmptyRule(LEFT_OUT, LEFT_OUT, LEFT_OUT),
            NSD: EmptyRule(LEFT_OUT, LEFT_OUT, LEFT_OUT),
            SENSITIVITY: EmptyRule(LEFT_OUT, 0.0, LEFT_OUT),
            PRECISION: EmptyRule(LEFT_OUT, LEFT_OUT, 0.0),
            VOLUME_ERROR: EmptyRule(FORMULA, FORMULA, FORMULA),
            RELATIVE_VOLUME_ERROR: EmptyRule(LEFT_OUT, FORMULA, LEFT_OUT),
        },
    ),
}

LESION_RULES: Mapping[str, EmptyRule] = {
    LESION_DICE: EmptyRule(1.0, 0.0, 0.0),
    LESION_HD95: EmptyRule(0.0, PENALTY, PENALTY),
}
"""Shared by all lesion-wise conventions; ``both`` means that there is nothing to score."""


def empty_value(
    metric: str, convention: str, *, prediction_empty: bool, reference_empty: bool, diagonal: float = math.nan
) -> float | None:
    """The value of a metric for a pair with an empty mask; None where the metric's formula applies.

    ``diagonal`` is the length of the image diagonal in millimetres.
    """
    rule = _rule(metric, convention)
    if not (prediction_empty or reference_empty):
        return None
    one = rule.prediction if prediction_empty else rule.reference
    value = rule.both if prediction_empty and reference_empty else one
    if value == FORMULA:
        return None
    return diagonal if value == DIAGONAL else float(value)


def empty_rules_text(
    convention: str = BRATS, metrics: Iterable[str] = (DICE, HD95), *, lesion_convention: str | None = None
) -> str:
    """Describe the rules for empty masks, one line per metric, as a note under a table of metrics.

    The names are from :data:`CONVENTIONS`, :data:`METRICS` and, for lesion-wise metrics, :data:`LESION_CONVENTIONS`.
    """
    metrics = list(metrics)
    lines = []
    plain = [name for name in metrics if name not in LESION_RULES]
    if plain:
        lines.append(f"Rules for empty masks: {convention} ({_convention(convention).source})")
    for name in plain:
        both, prediction, reference = map(_word, _rule(name, convention))
        if both == prediction == reference:
            text = f"{both} if any mask is empty"
        elif prediction == reference:
            text = f"{both} if both masks are empty, {prediction} if one is"
        else:
            text = f"{both} if both masks are empty, {prediction} if only the prediction is, {reference} if only the "
            text += "reference is"
        lines.append(f"{metric_named(name).label}: {text}")
    lesionwise = [name for name in metrics if name in LESION_RULES]
    if not lesionwise:
        return "\n".join(lines)
    if lesion_convention is None:
        raise InputError(
            f"{lesionwise[0]} needs the name of its lesion-wise convention; known are {', '.join(LESION_CONVENTIONS)}"
        )
    settings = lesion_convention_named(lesion_convention)
    lines.append(f"Lesions ({lesion_convention}: {settings.source})")
    penalty = DIAGONAL if settings.penalty_mm is None else f"{settings.penalty_mm:g} mm"
    for name in lesionwise:
        nothing, missed, false = (penalty if value == PENALTY else _word(value) for value in LESION_RULES[name])
        lines.append(
            f"{metric_named(name).label}: nothing to score {nothing}; a missed lesion {missed}; a false lesion {false}"
        )
    return "\n".join(lines)


def _word(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "left out of the mean" if math.isnan(value) else f"{value:g}"


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise InputError(f"unknown convention {name!r} for empty masks; known are {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _rule(metric: str, convention: str) -> EmptyRule:
    rules = _convention(convention).rules
    if metric not in rules:
        metric_named(metric)
        raise InputError(f"the convention {convention!r} has no rule for {metric}; it has {', '.join(rules)}")
    return rules[metric]


# ---- regions -------------------------------------------------------------------------------------------------------

REGION_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "ET": ("et", "enhancing tumor", "enhancing tumour", "enhancing"),
    "WT": ("wt", "whole tumor", "whole tumour", "whole"),
}


def known_name(name: str, spellings: Mapping[str, Iterable[str]]) -> str | None:
    """The key under whose spellings a name is listed, in upper or lower case; None if it is none of them."""
    folded = name.strip().casefold()
    return next((known for known, others in spellings.items() if folded in others), None)


# ---- small predictions ---------------------------------------------------------------------------------------------

_MIN_VOXELS = re.compile(r"(.+) \(min (\d+)\)")


def min_voxels_region(region: str, voxels: int) -> str:
    """Name of a region that counts as not found where it is predicted with fewer voxels, such as ``ET (min 500)``."""
    return f"{region} (min {voxels})"


def postprocessed_regions(regions: Iterable[str]) -> dict[str, int]:
    """The regions named by :func:`min_voxels_region` beside their plain ones, and their numbers of voxels.

    They say the same as the plain region once more, so no average over regions includes them.
    """
    regions = list(regions)
    matches = {name: _MIN_VOXELS.fullmatch(name) for name in regions}
    return {name: int(found.group(2)) for name, found in matches.items() if found and found.group(1) in regions}


def min_voxels_text(regions: Iterable[str]) -> list[str]:
    """What postprocessed regions mean, a sentence for each, as notes under a table."""
    return [
        f"{name}: not found where fewer than {voxels} voxels are predicted in all, whether these become background "
        f"(RFNet, mmFormer) or necrosis (nnU-Net 1, DeMoSeg); other regions are scored without this step"
        for name, voxels in postprocessed_regions(regions).items()
    ]


# ---- lesion-wise conventions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LesionConvention:
    """How an edition of BraTS counts lesions."""

    source: str
    """The code that defines it."""
    dilation: int
    """Iterations of dilation with the 18-neighbourhood. Reference components whose dilations touch are one lesion, and
    a predicted lesion that touches the dilation belongs to it."""
    min_volume: float
    """Reference lesions of at most this volume (mm3) are not scored."""
    penalty_mm: float | None
    """HD95 of a missed or false lesion; None: the image diagonal."""
    group_predictions: bool = False
    """Group predicted components by dilation too, and drop groups of at most ``min_volume`` *voxels*."""
    region_dilation: Mapping[str, int] = field(default_factory=dict)
    region_min_volume: Mapping[str, float] = field(default_factory=dict)
    partners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Lesions of a region that touch the same lesion of a partner count as one lesion, partner after partner."""

    def dilation_of(self, region: str) -> int:
        return self.region_dilation.get(region, self.dilation)

    def min_volume_of(self, region: str) -> float:
        return self.region_min_volume.get(region, self.min_volume)


_YEAR_2023 = "rachitsaluja/BraTS-2023-Metrics, eval.py"
_YEAR_2024 = "rachitsaluja/BraTS-2024-Metrics, metrics_{}.py"
_NECROSIS_JOINS = {"ET": ("NETC",)}

# source, dilation, minimum volume, penalty
LESION_CONVENTIONS: Mapping[str, LesionConvention] = {
    "brats2023_gli": LesionConvention(_YEAR_2023, 3, 50, 374),
    "brats2023_ssa": LesionConvention(_YEAR_2023, 3, 50, 374),
    "brats2023_ped": LesionConvention(_YEAR_2023, 3, 50, 374),
    "brats2023_men": LesionConvention(_YEAR_2023, 1, 50, 374),
    "brats2023_met": LesionConvention(_YEAR_2023, 1, 2, 374),
    "brats2024_gli": LesionConvention(
        _YEAR_2024.format("GLI"),
        dilation=3,
        min_volume=20,
        penalty_mm=337,
        group_predictions=True,
        # SNFH stays at 3: the release asks for "SFNH", a name that no tissue has, where it sets 5
        region_dilation={"NETC": 5, "RC": 5},
        region_min_volume={"ET": 10},
        partners={"ET": ("NETC", "RC"), "NETC": ("ET", "RC"), "RC": ("ET", "NETC"), "SNFH": ("ET", "RC", "NETC")},
    ),
    "brats2024_ped": LesionConvention(_YEAR_2024.format("PED"), 5, 10, 374, group_predictions=True),
    "brats2024_ssa": LesionConvention(
        _YEAR_2024.format("SSA"), 3, 50, 374, group_predictions=True, partners=_NECROSIS_JOINS
    ),
    "brats2024_men": LesionConvention(_YEAR_2024.format("MEN"), 1, 50, 374),
    # native grids of different size, so the penalty is each image's own diagonal (first version of the file: 374)
    "brats2024_met": LesionConvention(
        _YEAR_2024.format("MET"), 1, 2, None, group_predictions=True, partners=_NECROSIS_JOINS
    ),
}


def lesion_convention_named(name: str) -> LesionConvention:
    """Look up a lesion-wise convention; an unknown name is an InputError that lists the known ones."""
    if name not in LESION_CONVENTIONS:
        raise InputError(f"unknown lesion-wise convention {name!r}; known are {', '.join(LESION_CONVENTIONS)}")
    return LESION_CONVENTIONS[name]
