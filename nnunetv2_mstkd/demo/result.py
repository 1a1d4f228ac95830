"""The result of the demo: scores, table, summary, pictures and next steps."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunetv2_mstkd.demo import pictures
from nnunetv2_mstkd.demo.inputs import JOIN
from nnunetv2_mstkd.demo.pipeline import CHANNELS, DATASET, STUDENT, TEACHER, Demo
from nnunetv2_mstkd.demo.steps import FOLDERS
from nnunetv2_mstkd.metrics.overlap import dice

SHOWN_SUBSETS = ("T1", "T1ce", "FLAIR", "T1+T2", "T1ce+FLAIR", "T1+T1ce+T2+FLAIR")
SHORT = {"whole tumor": "WT", "tumor core": "TC", "enhancing tumor": "ET"}


def write_result(demo: Demo, identifiers: Sequence[str]) -> str:
    """Score the predictions, write ``results.csv`` and the pictures, and return the text to print.

    Parameters
    ----------
    demo
        The demo, which has run.
    identifiers
        The predicted ``CASE__SUBSET``.
    """
    predictions = {model.title: demo.predictions(model) for model in demo.models}
    scores = score(identifiers, predictions, demo.raw / "labelsTs", regions(demo.raw / "dataset.json"))
    scores.to_csv(demo.folder / "results.csv", index=False)
    pictures.heat_map(scores, demo.folder / "heatmap.png")
    case = typical_case(scores[scores["model"] == STUDENT.title])
    shown = {title: predictions[title] for title in (TEACHER.title, STUDENT.title)}
    reference = demo.raw / "labelsTs" / f"{case}.nii.gz"
    pictures.slices(
        case, SHOWN_SUBSETS, demo.raw / "imagesTs", reference, shown, CHANNELS, scores, demo.folder / "slices.png"
    )
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
    model = f"-d {DATASET} -c {STUDENT.configuration} -f 0 -tr {STUDENT.trainer} -device {demo.options.device}"
    return [
        f"  export {folders}",
        f"  mstkd predict -i {images} -o {output} {model} --drop T1ce",
        f"  mstkd evaluate {model}",
    ]


def typical_case(scores: pd.DataFrame) -> str:
    """The case of median Dice: neither the best nor the worst one."""
    means = scores.groupby("case")["dice"].mean().sort_values()
    return str(means.index[len(means) // 2])


def regions(dataset_json: Path) -> dict[str, tuple[int, ...]]:
    """Maps each region to its label values, from dataset.json."""
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
    """``\u25cf`` for an available modality, ``\u25cb`` for a missing one."""
    present = subset.split("+")
    return "  ".join(("\u25cf" if name in present else "\u25cb").center(len(name)) for name in names)


def table(scores: pd.DataFrame, names: Sequence[str]) -> str:
    """One line per subset with WT / TC / ET and their mean per model, in percent."""
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
    """Mean Dice by number of available modalities, and each model's difference from the first one, in points."""
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
