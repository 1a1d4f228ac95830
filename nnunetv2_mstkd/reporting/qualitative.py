"""One figure as in papers: of chosen cases and subsets the images, the reference, and every model's segmentation."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.montage import Montage, read_montage
from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODALITIES,
    REGION,
    SEPARATOR,
    SUBSET,
    VALUE,
    first_of,
)
from nnunetv2_mstkd.inference.evaluation_files import CASES
from nnunetv2_mstkd.metrics.conventions import metric_named
from nnunetv2_mstkd.reporting.figures import literally, new_figure
from nnunetv2_mstkd.reporting.pictures import (
    OPACITY,
    Color,
    clearest_image,
    cropped,
    fractions,
    label_colors,
    region_colors,
)
from nnunetv2_mstkd.reporting.tables import number
from nnunetv2_mstkd.statistics.comparison import Comparison, EvaluatedModel

ABSENT = "missing"
PANEL = 1.35
"""Width of a picture in inches."""

LINE = 28
"""Characters below a picture."""
TITLE = 22
"""Characters above it."""

ALL = "all"


def qualitative_plot(comparison: Comparison, cases: Sequence[str] = (), subsets: Sequence[str] = ()) -> Figure | None:
    """Rows of pictures: a case's images with boxes for absent ones, the reference, and the segmentation of every model.

    The slices are those that the evaluations have kept; of several training runs of a model the first is shown. Below
    each segmentation stands its value of the first metric, of the whole case.

    Parameters
    ----------
    comparison:
        Evaluated models.
    cases, subsets:
        What to show; default: the case of median value, and of each number of modalities the subset of lowest value.

    Returns
    -------
    None if no slices were kept, or not the same ones.

    Raises
    ------
    InputError
        For a case or subset that is not compared, or of which slices were asked for that were not kept.
    """
    labels: dict[str, list[int]] = comparison.rule("regions") or {}
    models = {each.name: each for each in reversed(comparison.models)}
    models = {name: models[name] for name in comparison.trainings}
    shared = Counter(each.file for each in models.values())  # of a file with several models, slices are of one of them
    chosen_subsets = _subsets(comparison, subsets)
    of_images = next(iter(models.values()))
    channels = of_images.settings.get("channels") or comparison.rule("channels")
    kept = bool(labels and channels) and max(shared.values()) == 1
    rows = _rows(comparison, models, cases, chosen_subsets) if kept else []
    if not rows or len(rows[0][2].images) != len(channels):
        if cases or subsets:
            asked = ", ".join([*cases, *subsets])
            raise InputError(
                f"the evaluations have not kept the same slices of all models for {asked}; evaluate them again with "
                f"--restart"
            )
        return None
    regions = {name: tuple(values) for name, values in labels.items()}
    compared = SEPARATOR.join(comparison.subsets).split(SEPARATOR)
    names = {name: channel for channel, name in enumerate(channels) if name in compared}
    return _draw(comparison, models, rows, regions, names)


def _subsets(comparison: Comparison, subsets: Sequence[str]) -> list[str]:
    if not subsets:
        values = comparison.results[comparison.results[METRIC] == comparison.metrics[0]]
        better = metric_named(comparison.metrics[0]).better or -1
        means = (better * values[VALUE].abs()).groupby([values[MODALITIES], values[SUBSET]], sort=True).mean()
        # of a size whose values are all left out (nan) there is nothing to choose by
        return [str(of_size.idxmin()[1]) for _, of_size in means.dropna().groupby(level=0)]
    known = {frozenset(name.split(SEPARATOR)): name for name in comparison.subsets}
    known[frozenset([ALL])] = comparison.subsets[-1]
    wanted = {text: frozenset(text.replace(",", SEPARATOR).split(SEPARATOR)) for text in subsets}
    unknown = [text for text, members in wanted.items() if members not in known]
    if unknown:
        raise InputError(f"the subset {unknown[0]} is not compared; the subsets are {', '.join(comparison.subsets)}")
    return [known[members] for members in wanted.values()]


def _rows(
    comparison: Comparison, models: Mapping[str, EvaluatedModel], cases: Sequence[str], subsets: Sequence[str]
) -> list[tuple[str, str, Montage]]:
    """Case, subset, and the slice with a segmentation per model; empty if slices are missing."""
    unknown = [case for case in cases if case not in comparison.cases]
    if unknown:
        raise InputError(f"the case {unknown[0]} is not compared; the cases are {first_of(comparison.cases)}")
    for group in [list(cases)] if cases else [[case] for case in _from_the_median(comparison)]:
        rows = [(case, subset, _montage(models, case, subset)) for case in group for subset in subsets]
        complete = [(case, subset, montage) for case, subset, montage in rows if montage is not None]
        if len(complete) == len(rows):
            return complete
    return []


def _from_the_median(comparison: Comparison) -> list[str]:
    """The cases, those of middle value first."""
    values = comparison.results[comparison.results[METRIC] == comparison.metrics[0]]
    ordered = list(values.groupby(CASE)[VALUE].mean().sort_values(kind="stable").index)
    middle = (len(ordered) - 1) / 2
    return sorted(ordered, key=lambda case: abs(ordered.index(case) - middle))


def _montage(models: Mapping[str, EvaluatedModel], case: str, subset: str) -> Montage | None:
    """The slice of a case with the segmentations by model; None if one lacks it or shows another one."""
    found: Montage | None = None
    for name, model in models.items():
        montage = read_montage(model.file.parent / CASES / f"fold_{_fold(model, case)}" / f"{case}.npz")
        if montage is None or subset not in montage.segmentations or _results(model, case, subset).empty:
            return None  # pictures of an earlier evaluation may be there
        if found is None:
            found = replace(montage, segmentations={}, further=())
        elif montage.index != found.index or not np.array_equal(montage.reference, found.reference):
            return None
        found = replace(found, segmentations={**found.segmentations, name: montage.segmentations[subset]})
    return None if found is None else cropped(found)


def _fold(model: EvaluatedModel, case: str) -> str:
    return str(model.results.loc[model.results[CASE] == case, FOLD].iloc[0])


# ---- drawing -------------------------------------------------------------------------------------------------------


@literally
def _draw(
    comparison: Comparison,
    models: Mapping[str, EvaluatedModel],
    rows: Sequence[tuple[str, str, Montage]],
    regions: Mapping[str, tuple[int, ...]],
    names: Mapping[str, int],
) -> Figure:
    """The figure; ``names`` are the modalities to show, and the channel of each in the images."""
    colors = label_colors(sorted({label for values in regions.values() for label in values}), None)
    metric = comparison.metrics[0]
    texts = [[_values(model, case, subset, metric, regions) for model in models.values()] for case, subset, _ in rows]
    below = 0.15 + 0.1 * max(text.count("\n") + 1 for of_row in texts for text in of_row)
    heights = [montage.reference.shape[0] / montage.reference.shape[1] * PANEL + below for _, _, montage in rows]
    columns = len(names) + 1 + len(models)
    figure = new_figure(PANEL * columns + 0.3, sum(heights) + 0.8)
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, (case, subset, montage), values in zip(axes, rows, texts, strict=True):
        images = {name: montage.images[channel] for name, channel in names.items()}
        available = [images[name] for name in subset.split(SEPARATOR)]
        background = available[clearest_image(replace(montage, images=np.stack(available)))]
        for axis, (name, image) in zip(line, images.items(), strict=False):
            _image(axis, image, name in subset.split(SEPARATOR))
        line[0].set_ylabel(case, fontsize=6)
        _overlay(line[len(names)], background, montage.reference, colors, None)
        for axis, name, text in zip(line[len(names) + 1 :], models, values, strict=True):
            _overlay(axis, background, montage.segmentations[name], colors, montage.reference != 0)
            axis.set_xlabel(text, fontsize=6, labelpad=2)
    for axis, title in zip(axes[0], [*names, "reference", *models], strict=True):
        parts = title.split("__")  # as in the name of a model folder
        axis.set_title("\n".join(line for part in parts for line in textwrap.wrap(part, TITLE)), fontsize=7.5)
    patches = [Patch(color=fractions(color), label=name) for name, color in region_colors(regions, colors).items()]
    outline = Line2D([], [], color="0.4", linewidth=1, label="outline: reference")
    kind = metric_named(metric)
    numbers = Line2D([], [], linestyle="none", label=f"numbers: {kind.label} ({kind.unit}) of the whole case")
    figure.legend(
        handles=[*patches, outline, numbers],
        loc="outside lower center",
        ncols=len(patches) + 2,
        frameon=False,
        fontsize=7,
    )
    return figure


def _image(axis: Axes, image: np.ndarray, there: bool = True) -> None:
    """A grey image, or a box of its size that says that it is missing."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(image if there else np.full_like(image, 255), cmap="gray", vmin=0, vmax=255)
    if there:
        axis.spines[:].set_visible(False)
        return
    axis.spines[:].set(linestyle=(0, (4, 3)), color="0.5")
    axis.text(0.5, 0.5, ABSENT, transform=axis.transAxes, ha="center", va="center", fontsize=8, color="0.4")


def _overlay(
    axis: Axes, image: np.ndarray, labels: np.ndarray, colors: Mapping[int, Color], outline: np.ndarray | None
) -> None:
    _image(axis, image)
    painted = np.zeros((*labels.shape, 4))
    for label, color in colors.items():
        painted[labels == label] = (*fractions(color), OPACITY / 255)
    axis.imshow(painted)
    if outline is not None and outline.any() and not outline.all():
        axis.contour(outline, [0.5], colors="white", linewidths=0.6)


def _results(model: EvaluatedModel, case: str, subset: str) -> pd.DataFrame:
    """What a model was measured to do for a case from a subset."""
    return model.results[(model.results[CASE] == case) & (model.results[SUBSET] == subset)]


def _values(model: EvaluatedModel, case: str, subset: str, metric: str, regions: Mapping[str, tuple[int, ...]]) -> str:
    """The values of the regions, as many to a line as fit below a picture."""
    table = _results(model, case, subset)
    values = table[table[METRIC] == metric].groupby(REGION)[VALUE].mean() * metric_named(metric).factor
    lines: list[str] = []
    for text in (f"{name} {number(values.get(name, math.nan))}" for name in regions):
        fits = lines and len(lines[-1]) + len(text) + 2 <= LINE
        lines[-1:] = [f"{lines[-1]}  {text}"] if fits else [*lines[-1:], text]
    return "\n".join(lines)
