"""Scoring the demo's predictions and putting them into words: table, CSV and summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunetv2_mstkd.demo.inputs import JOIN
from nnunetv2_mstkd.metrics.overlap import dice

SHORT = {"whole tumor": "WT", "tumor core": "TC", "enhancing tumor": "ET"}


def regions(dataset_json: Path) -> dict[str, tuple[int, ...]]:
    """Region name to label values, from dataset.json."""
    labels = json.loads(dataset_json.read_text())["labels"]
    return {
        SHORT.get(name, name): tuple(np.atleast_1d(values).tolist())
        for name, values in labels.items()
        if name != "background"
    }


def score(
    identifiers: Sequence[str],
    predictions: Mapping[str, Path],
    references: Path,
    region_labels: Mapping[str, tuple[int, ...]],
) -> pd.DataFrame:
    """Dice of every prediction, in long form: model, case, subset, modalities, region, dice.

    Parameters
    ----------
    identifiers:
        ``CASE__SUBSET``.
    predictions:
        folder of segmentations by model name.
    references:
        folder of ``CASE.nii.gz``.
    """
    rows = []
    labels: dict[str, np.ndarray] = {}
    for identifier in identifiers:
        case, subset = identifier.split(JOIN)
        if case not in labels:
            labels[case] = sitk.GetArrayFromImage(sitk.ReadImage(str(references / f"{case}.nii.gz")))
        for model, folder in predictions.items():
            found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{identifier}.nii.gz")))
            for region, values in region_labels.items():
                value = dice(np.isin(found, values), np.isin(labels[case], values))
                rows.append((model, case, subset, subset.count("+") + 1, region, value))
    return pd.DataFrame(rows, columns=["model", "case", "subset", "modalities", "region", "dice"])


def dots(subset: str, names: Sequence[str]) -> str:
    """``\u25cf`` for a modality that is there, ``\u25cb`` for one that is not."""
    present = subset.split("+")
    return "  ".join(("\u25cf" if name in present else "\u25cb").center(len(name)) for name in names)


def table(scores: pd.DataFrame, names: Sequence[str]) -> str:
    """The table that the demo prints: one line per subset, WT / TC / ET and their mean per model, in percent."""
    models, region_names = list(scores["model"].unique()), list(scores["region"].unique())
    means = scores.groupby(["subset", "model", "region"], sort=False)["dice"].mean().mul(100)
    head = "  ".join(names)
    width = 7 * (len(region_names) + 1)
    lines = [
        " " * len(head) + "".join(f" | {model:^{width}}" for model in models),
        head + "".join(" | " + "".join(f"{name:>7}" for name in [*region_names, "mean"]) for _ in models),
    ]
    lines.append("-" * len(lines[1]))

    def cells(values: pd.Series) -> str:
        return "".join(f"{values[region]:7.1f}" for region in region_names) + f"{values[region_names].mean():7.1f}"

    for subset in scores["subset"].unique():
        lines.append(dots(subset, names) + "".join(f" | {cells(means[subset][model])}" for model in models))
    lines.append("-" * len(lines[1]))
    overall = scores.groupby(["model", "region"], sort=False)["dice"].mean().mul(100)
    lines.append(f"{'mean':<{len(head)}}" + "".join(f" | {cells(overall[model])}" for model in models))
    return "\n".join(lines)


def summary(scores: pd.DataFrame) -> str:
    """Mean Dice by number of available modalities, and each model's difference to the first one, in points."""
    models = list(scores["model"].unique())
    by_number = scores.groupby(["model", "modalities"], sort=False)["dice"].mean().mul(100).unstack()
    overall = scores.groupby("model", sort=False)["dice"].mean().mul(100)
    longest = max(map(len, models))
    counts = sorted(by_number.columns)
    lines = [f"{'modalities available':<{longest}}" + "".join(f"{count:>8}" for count in counts) + f"{'all':>8}"]
    longest = len(lines[0]) - 8 * (len(counts) + 1)
    for model in models:
        values = "".join(f"{by_number.loc[model, count]:8.1f}" for count in counts)
        gain = "" if model == models[0] else f"   ({overall[model] - overall[models[0]]:+.1f} points)"
        lines.append(f"{model:<{longest}}{values}{overall[model]:8.1f}{gain}")
    return "\n".join(lines)
