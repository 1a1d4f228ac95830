"""The Dice to expect of each subset of modalities, from an evaluation of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference import evaluation_files

SUMMARY = Path(evaluation_files.FOLDER, evaluation_files.SUMMARY)


def read_expected_dice(model_folder: Path, names: Sequence[str]) -> dict[int, dict[str, float]]:
    """Read the mean Dice per subset and region from the evaluation in a model folder.

    Parameters
    ----------
    model_folder
        nnU-Net's folder of a trained model.
    names
        Names of its C channels.

    Returns
    -------
    :func:`~nnunetv2_mstkd.modalities.subset_code` -> region -> Dice between 0 and 1. Empty without an evaluation. A
    region without a finite Dice (nothing to find in any case) is left out.

    Raises
    ------
    InputError
        If the file is no such evaluation, or one of other modalities.
    """
    file = model_folder / SUMMARY
    if not file.is_file():
        return {}
    expected: dict[int, dict[str, float]] = {}
    try:
        for text, regions in json.loads(file.read_text(encoding="utf-8"))["subsets"].items():
            code = modalities.subset_code(modalities.parse_subset(text, names))
            values = {region: measures.get("dice") for region, measures in regions.items()}
            expected[code] = {
                region: float(dice) for region, dice in values.items() if dice is not None and math.isfinite(dice)
            }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no evaluation of this model's subsets ({type(error).__name__}: {error}); evaluate again"
        ) from error
    return expected


def format_dice(dice: Mapping[str, float] | None) -> str:
    """``WT 0.912, TC 0.874``; empty where nothing is known."""
    return ", ".join(f"{region} {value:.3f}" for region, value in (dice or {}).items())
