"""The demo's two pictures: a heat map of Dice, and one slice segmented from several subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from nnunetv2_mstkd.demo.inputs import JOIN
from nnunetv2_mstkd.reporting import figures

COLORS = ("#f2c14e", "#4d9de0", "#e15554")
"""Edema, core without enhancement, enhancing tumor."""
LABELS = ("edema", "non-enhancing core", "enhancing tumor")
DISCLAIMER = "synthetic phantom: these numbers say nothing about clinical performance"


def heat_map(scores: pd.DataFrame, file: Path) -> None:
    """Dice by subset (rows) and region (columns), one panel per model, as in an evaluation's report."""
    figure = figures.heat_map(
        scores.rename(columns={"dice": "value"}).assign(trainer=scores["model"], fold="0", metric="dice")
    )
    means = 100 * scores.groupby("model", sort=False)["dice"].mean()
    for axis, (model, mean) in zip(figure.axes, means.items(), strict=False):  # the last one is the scale
        axis.set_title(f"{model}\nmean {mean:.1f}", fontsize=10)
    figure.supxlabel(DISCLAIMER, fontsize=8, color="0.4")
    figures.save_figure(figure, file, dpi=110)


def slices(
    case: str,
    subsets: Sequence[str],
    raw: Path,
    predictions: Mapping[str, Path],
    channel_names: Sequence[str],
    scores: pd.DataFrame,
    file: Path,
) -> None:
    """The slice with most tumor: truth in the first column, then each model (rows) from each subset (columns).

    The background of a column, named below it, is the last available modality of its subset. A white line is the
    border of the true tumor. `raw` is the data set of the test case.
    """
    truth = read_array(raw / "labelsTs" / f"{case}.nii.gz")
    index = int((truth > 0).sum((1, 2)).argmax())
    channels = {
        name: read_array(raw / "imagesTs" / f"{case}_{i:04d}.nii.gz")[index] for i, name in enumerate(channel_names)
    }
    columns = ["truth", *subsets]
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(
            len(predictions),
            len(columns),
            figsize=(1.75 * len(columns), 2.4 * len(predictions) + 0.6),
            squeeze=False,
            gridspec_kw={"hspace": 0.25, "wspace": 0.08, "left": 0.03, "right": 0.99, "bottom": 0.09, "top": 0.83},
        )
        for row, (model, folder) in enumerate(predictions.items()):
            for axis, column in zip(axes[row], columns, strict=True):
                shown = channel_names[-1] if column == "truth" else column.split("+")[-1]
                label = truth if column == "truth" else read_array(folder / f"{case}{JOIN}{column}.nii.gz")
                _draw(axis, channels[shown], label[index], truth[index])
                axis.set_xlabel(f"on {shown}")
                if column == "truth":
                    axis.set_ylabel(model)
                    axis.set_title("ground truth" if row == 0 else "")
                    continue
                own = scores[(scores["model"] == model) & (scores["case"] == case) & (scores["subset"] == column)]
                text = " / ".join(f"{100 * value:.0f}" for value in own["dice"])
                name = column if column.count("+") + 1 < len(channel_names) else "all"
                axis.set_title(f"{name}\n{text}" if row == 0 else text)
        handles = [Patch(color=color, label=label) for color, label in zip(COLORS, LABELS, strict=True)]
        figure.legend(handles=handles, loc="lower center", ncol=3, frameon=False)
        names = " / ".join(scores["region"].unique())
        figure.suptitle(f"{case}, one slice; numbers are the case's Dice {names} in percent", fontsize=10)
        figure.savefig(file, dpi=120)
        plt.close(figure)


def read_array(path: Path) -> np.ndarray:
    """The voxels of an image, shape (z, y, x)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _draw(axis, image: np.ndarray, label: np.ndarray, truth: np.ndarray) -> None:
    inside = image[image > 0]
    high = np.percentile(inside, 99.5) if inside.size else 1
    axis.imshow(image, cmap="gray", vmin=0, vmax=high, interpolation="nearest")
    overlay = np.ma.masked_equal(label, 0)
    axis.imshow(overlay, cmap=ListedColormap(COLORS), vmin=1, vmax=3, alpha=0.55, interpolation="nearest")
    axis.contour(truth > 0, levels=[0.5], colors="white", linewidths=0.7)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
