"""The result of the demo: scores, table, summary, pictures and next steps."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_mstkd.demo import pictures
from nnunetv2_mstkd.demo.inputs import JOIN
from nnunetv2_mstkd.demo.pictures import read_array
from nnunetv2_mstkd.demo.pipeline import CHANNELS, STUDENT, TEACHER, Demo
from nnunetv2_mstkd.demo.steps import FOLDERS
from nnunetv2_mstkd.metrics.overlap import dice

SHOWN_SUBSETS = ("T1", "T1ce", "FLAIR", "T1+T2", "T1ce+FLAIR", "T1+T1ce+T2+FLAIR")
SHORT = {"whole tumor": "WT", "tumor core": "TC", "enhancing tumor": "ET"}


def write_result(demo: Demo, identifiers: Sequence[str]) -> str:
    """Score the predictions ``CASE__SUBSET``, write ``results.csv`` and the pictures, and return the text to print."""
    predictions = {model.title: demo.predictions(model) for model in demo.models}
    scores = score(identifiers, predictions, demo.raw / "labelsTs", regions(demo.raw / "dataset.json"))
    scores.to_csv(demo.folder / "results.csv", index=False)
    pictures.heat_map(scores, demo.folder / "heatmap.png")
    case = typical_case(scores[scores["model"] == STUDENT.title])
    shown = {title: predictions[title] for title in (TEACHER.title, STUDENT.title)}
    pictures.slices(case, SHOWN_SUBSETS, demo.raw, shown, CHANNELS, scores, demo.folder / "slices.png")
    files = {
        "heat map": demo.folder / "heatmap.png",
        "one slice, several subsets": demo.folder / "slices.png",
        "all numbers": demo.folder / "results.csv",
        "predictions (NIfTI)": predictions[STUDENT.title],
        "trained models": demo.folder / "results",
    }
    cases = scores["case"].nunique()
    return "\n".join(
        [
            f"\nDice in percent, mean over {cases} test cases (WT whole tumor, TC tumor core, ET enhancing tumor)\n",
            table(scores, CHANNELS),
            "\nmean over regions, by the number of available modalities\n",
            summary(scores),
            f"\n{pictures.DISCLAIMER}",
            f"measured in {sum(demo.record['seconds'].values()) / 60:.1f} minutes of computing\n",
            *(f"{what + ':':<28}{path}" for what, path in files.items()),
            "\nnext, predict without T1ce, and evaluate all subsets on the validation cases:\n",
            *next_commands(demo),
        ]
    )


def next_commands(demo: Demo) -> list[str]:
    """Commands to try on the student."""
    folders = " ".join(f"{name}={shlex.quote(str(demo.folder / sub))}" for name, sub in FOLDERS.items())
    images, output = (shlex.quote(str(path)) for path in (demo.raw / "imagesTs", demo.folder / "without_T1ce"))
    model = demo.words(STUDENT)
    return [
        f"  export {folders}",
        f"  mstkd predict -i {images} -o {output} {model} --drop T1ce",
        f"  mstkd evaluate {model}",
    ]


def typical_case(scores: pd.DataFrame) -> str:
    """The case of median Dice: neither the best nor the worst one."""
    means = scores.groupby("case")["dice"].mean().sort_values()
    return str(means.index[len(means) // 2])


def regions(dataset_json: Path) -> dict[str, int | list[int]]:
    """Maps each region to its label values, from dataset.json."""
    labels = json.loads(dataset_json.read_text())["labels"]
    return {SHORT.get(name, name): values for name, values in labels.items() if name != "background"}


def score(
    identifiers: Sequence[str], predictions: Mapping[str, Path], references: Path, region_labels: Mapping[str, Any]
) -> pd.DataFrame:
    """Dice of every prediction, in long form: model, case, subset, modalities, region, dice.

    Parameters
    ----------
    identifiers
        Predicted ``CASE__SUBSET``.
    predictions
        Maps each model to its folder of segmentations.
    references
        Folder of ``CASE.nii.gz``.
    region_labels
        From :func:`regions`.
    """
    rows = []
    for identifier in identifiers:
        case, subset = identifier.split(JOIN)
        truth = read_array(references / f"{case}.nii.gz")
        for model, folder in predictions.items():
            found = read_array(folder / f"{identifier}.nii.gz")
            for region, values in region_labels.items():
                value = dice(np.isin(found, values), np.isin(truth, values))
                rows.append((model, case, subset, subset.count("+") + 1, region, value))
    return pd.DataFrame(rows, columns=["model", "case", "subset", "modalities", "region", "dice"])


def dots(subset: str, names: Sequence[str]) -> str:
    """``\u25cf`` for an available modality, ``\u25cb`` for a missing one."""
    present = subset.split("+")
    return "  ".join(("\u25cf" if name in present else "\u25cb").center(len(name)) for name in names)


def table(scores: pd.DataFrame, names: Sequence[str]) -> str:
    """One line per subset with WT / TC / ET and their mean per model, in percent."""
    subsets, region_names = scores["subset"].unique(), scores["region"].unique()
    columns = [["", "  ".join(names), *(dots(subset, names) for subset in subsets), "mean"]]
    for model, part in scores.groupby("model", sort=False):
        means = 100 * part.pivot_table("dice", "subset", "region").loc[subsets, region_names]
        means.loc["mean"] = means.mean()
        text = means.assign(mean=means.mean(axis=1)).to_string(index=False, col_space=6, float_format="%.1f")
        columns.append([str(model), *text.splitlines()])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        " | ".join(f"{cell:{'^' if number == 0 else '<'}{width}}" for cell, width in zip(row, widths, strict=True))
        for number, row in enumerate(zip(*columns, strict=True))
    ]
    rule = "-" * len(lines[0])
    return "\n".join([*lines[:2], rule, *lines[2:-1], rule, lines[-1]])


def summary(scores: pd.DataFrame) -> str:
    """Mean Dice by number of available modalities, and each model's difference from the first one, in points."""
    means = 100 * scores.pivot_table("dice", "model", "modalities").loc[scores["model"].unique()]
    means["all"] = 100 * scores.groupby("model")["dice"].mean()
    gains = means["all"] - means["all"].iloc[0]
    means[""] = ["", *(f"({gain:+.1f} points)" for gain in gains.iloc[1:])]
    means = means.rename_axis(index=None, columns="modalities available")
    return means.to_string(col_space=7, float_format="%.1f")
