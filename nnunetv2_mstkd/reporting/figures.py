"""Figures of an evaluation (heat map, curve over the number of modalities, Shapley bars) and of a comparison.

They are drawn without pyplot, which needs no window system and keeps no global state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import MODALITIES, MODEL, REGION, SUBSET, VALUE
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.metrics.conventions import DICE, metric_named
from nnunetv2_mstkd.statistics.bootstrap import HIGH, LOW, cube, mean
from nnunetv2_mstkd.statistics.comparison import HOURS, PARAMETERS
from nnunetv2_mstkd.statistics.shapley import MODALITY
from nnunetv2_mstkd.statistics.significance import AGAINST, DIFFERENCE

RegionColor = tuple[float, float, float]
"""Red, green and blue from 0 to 1."""

COLORS = "colorblind"
NEUTRAL: RegionColor = (0.4, 0.4, 0.4)
"""Of the average over regions."""

MARKERS = "osD^vP*X"

literally = matplotlib.rc_context({"text.parse_math": False})
"""Decorates what draws or saves a figure: a $ in a name is a $ and does not start a formula."""


@literally
def heat_map(results: pd.DataFrame) -> Figure:
    """Mean Dice of every subset (rows) and region (columns), a panel per model, all from 0 to 100 %.

    ``results`` is the long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    """
    data = cube(results, DICE)
    means = 100 * mean(data.values, axis=1)
    panels = len(data.models)
    names = data.subsets
    if not data.complete:
        names = tuple(f"{name} (n = {number})" for name, number in zip(names, data.counts, strict=True))
    width = 1.6 + 0.09 * max(map(len, names)) + panels * max(1.9, 0.6 * len(data.regions))
    figure = new_figure(width, 1.4 + 0.26 * len(data.subsets))
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, model, values in zip(axes, data.models, means, strict=True):
        sns.heatmap(
            values,
            ax=axis,
            vmin=0,
            vmax=100,  # the whole scale, so that pages of models compare
            cmap="viridis",
            annot=True,
            fmt=".1f",
            annot_kws={"size": 8},
            cbar=False,
            xticklabels=[region.replace(" ", "\n") for region in data.regions],
            yticklabels=names,
        )
        axis.set_title(model, fontsize=10, pad=10)  # above the number at the top of the colour bar
        axis.tick_params(axis="x", rotation=0, labelsize=9, length=0)
        axis.tick_params(axis="y", rotation=0, labelsize=8, length=0)
    figure.colorbar(axes[-1].collections[0], ax=axes.tolist(), label=_label(DICE), fraction=0.05, pad=0.02)
    return figure


@literally
def curve_by_count(counts: pd.DataFrame, *, colors: Mapping[str, RegionColor] | None = None) -> Figure:
    """Mean against the number of available modalities with its interval, a line per model and a panel per region.

    ``counts`` is from :func:`~nnunetv2_mstkd.statistics.findings.mean_by_count`; ``colors`` are those of the regions,
    for a single model.
    """

    def draw(axis: Axes, part: pd.DataFrame, place: float, _: int, **style: Any) -> None:
        part = part.sort_values(MODALITIES)
        # slightly apart, or the intervals of different models would hide each other
        places = part[MODALITIES].to_numpy() + 0.08 * place
        axis.errorbar(places, part[VALUE].to_numpy(), _distances(part), marker="o", markersize=4, capsize=2, **style)

    figure = _panels(_scaled(counts, DICE), draw, width=2.6, label=_label(DICE), colors=colors)
    for axis in figure.axes:
        axis.set_xlabel("available modalities")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@literally
def shapley_bars(values: pd.DataFrame, *, colors: Mapping[str, RegionColor] | None = None) -> Figure:
    """Shapley value of each modality with its interval, a group of bars per modality and a panel per region.

    ``values`` is from :func:`~nnunetv2_mstkd.statistics.shapley.shapley`; ``colors`` as for :func:`curve_by_count`.
    """
    values = _scaled(values, DICE)
    names = list(dict.fromkeys(values[MODALITY]))

    def draw(axis: Axes, part: pd.DataFrame, place: float, of: int, **style: Any) -> None:
        _bars(axis, part.set_index(MODALITY).loc[names], place, of, **style)

    label = f"Shapley value, {_label(DICE)}"
    figure = _panels(values, draw, width=max(2.4, 0.5 * len(names)), label=label, colors=colors)
    for axis in figure.axes:
        axis.set_xticks(np.arange(len(names)), names)
        axis.axhline(0, color="0.3", linewidth=0.8)
    return figure


def _bars(axis: Axes, part: pd.DataFrame, place: float, of: int, **style: Any) -> None:
    """One bar with its interval for each row, at a place beside those of ``of`` series in all."""
    width, heights = 0.8 / of, part[VALUE].to_numpy()
    places = np.arange(len(part)) + width * place
    axis.bar(places, heights, 0.9 * width, yerr=_distances(part), ecolor="0.3", capsize=2, **style)


@literally
def missing_bars(missing: pd.DataFrame, *, colors: Mapping[str, RegionColor] | None = None) -> Figure:
    """Loss of Dice without each modality with its interval: a group of bars per modality, a bar per region.

    ``missing`` is from :func:`~nnunetv2_mstkd.statistics.findings.missing_one`; ``colors`` are those of the regions.
    """
    missing = _scaled(missing, DICE)
    names, regions = (list(dict.fromkeys(missing[column])) for column in (MODALITY, REGION))
    palette = _region_palette(regions, colors)
    figure = new_figure(1.4 + max(0.9, 0.3 * len(regions)) * len(names), 2.8)
    axis = figure.subplots()
    for number, region in enumerate(regions):
        part, place = missing[missing[REGION] == region], number - (len(regions) - 1) / 2
        _bars(axis, part.set_index(MODALITY).loc[names], place, len(regions), color=palette[region], label=region)
    _finish(axis, "", grid="y")
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(np.arange(len(names)), [f"without\n{name}" for name in names])
    axis.set_ylabel("loss of Dice (points)")
    axis.legend(frameon=False, fontsize=9)
    return figure


@literally
def differences_plot(
    overall: pd.DataFrame, by_count: pd.DataFrame, by_subset: pd.DataFrame, *, metric: str = "dice"
) -> Figure:
    """Paired differences of models with their intervals: over all subsets, by number of modalities, and by subset.

    Parameters
    ----------
    overall, by_count, by_subset:
        From :func:`~nnunetv2_mstkd.statistics.significance.compare`, ``compare_by_count`` and ``compare_subsets``.

    Returns
    -------
    A panel per region, a row per subset or group of subsets and a colour per pair of models.
    """
    regions = list(dict.fromkeys(by_subset[REGION]))
    counts = {
        number: f"{number} modalit{'y' if number == 1 else 'ies'}" for number in dict.fromkeys(by_count[MODALITIES])
    }
    rows = ["all subsets", *counts.values(), *dict.fromkeys(by_subset[SUBSET])]
    parts = [
        overall.assign(row=rows[0]),
        by_count.assign(row=by_count[MODALITIES].map(counts)),
        by_subset.assign(row=by_subset[SUBSET]),
    ]
    table = _scaled(pd.concat(parts, ignore_index=True).rename(columns={DIFFERENCE: VALUE}), metric)
    pairs = list(dict.fromkeys(zip(overall[MODEL], overall[AGAINST], strict=True)))
    width = 1.2 + 0.07 * max(map(len, rows)) + 2.6 * len(regions)
    figure = new_figure(width, 1.6 + (0.2 + 0.07 * len(pairs)) * len(rows))
    axes = figure.subplots(1, len(regions), sharey=True, sharex=True, squeeze=False)[0]
    places = {name: place for place, name in enumerate(rows)}
    colors = sns.color_palette(COLORS, len(pairs))
    for axis, region in zip(axes, regions, strict=True):
        axis.axvline(0, color="0.3", linewidth=0.8)
        for number, (model, against) in enumerate(pairs):
            of_pair = (table[MODEL] == model) & (table[AGAINST] == against)
            part = table[of_pair & (table[REGION] == region)]
            shift = 0.6 * (number - (len(pairs) - 1) / 2) / len(pairs)
            axis.errorbar(
                part[VALUE].to_numpy(),
                part["row"].map(places).to_numpy() + shift,
                xerr=_distances(part),
                label=f"{model} - {against}",
                color=colors[number],
                linestyle="none",
                marker="o",
                markersize=4,
                capsize=2,
            )
        axis.axhline(len(counts) + 0.5, color="0.8", linewidth=0.8)
        _finish(axis, region, grid="x")
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel(f"difference of {_label(metric).replace('(%)', '(points)')}", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(pairs), 2), frameon=False, fontsize=9)
    return figure


@literally
def cost_plot(costs: pd.DataFrame, *, metric: str = "dice") -> Figure | None:
    """Mean value of each model against its parameters and hours, a panel each; None where neither is known.

    ``costs`` is from :class:`~nnunetv2_mstkd.statistics.comparison.Comparison`. Small dots are trainings of a model,
    the large one is their mean.
    """
    labels = {PARAMETERS: "parameters (millions)", HOURS: "hours of training"}
    known = {column: label for column, label in labels.items() if costs[column].notna().any()}
    if not known:
        return None
    costs = costs.assign(**{VALUE: costs[VALUE] * metric_named(metric).factor, PARAMETERS: costs[PARAMETERS] / 1e6})
    models = list(dict.fromkeys(costs[MODEL]))
    figure = new_figure(0.8 + 3.6 * len(known), 3.4)
    axes = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axis, (column, label) in zip(axes, known.items(), strict=True):
        for number, (model, color) in enumerate(zip(models, sns.color_palette(COLORS, len(models)), strict=True)):
            part = costs[(costs[MODEL] == model) & costs[column].notna()]
            marker = MARKERS[number % len(MARKERS)]
            if len(part) > 1:
                axis.scatter(part[column], part[VALUE], s=12, color=color, marker=marker, alpha=0.6)
            axis.scatter(part[column].mean(), part[VALUE].mean(), s=60, color=color, marker=marker, label=model)
        _finish(axis, "", grid="y")
        axis.set_xlabel(label)
        axis.margins(y=0.1)
        axis.set_xlim(0, 1.1 * costs[column].max())
    axes[0].set_ylabel(_label(metric))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(models), 4), frameon=False, fontsize=9)
    return figure


@literally
def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> None:
    """Write a figure atomically, in the format of the file name's ending (png, pdf, svg)."""
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower()
    if ending not in formats:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'}; expected .png, .pdf or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format=ending, dpi=dpi)


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, without pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _region_palette(regions: Sequence[str], colors: Mapping[str, RegionColor] | None) -> dict[str, RegionColor]:
    """The colours of regions; a postprocessed region has that of the plain one."""
    if colors is None:
        colors = dict(zip(regions, sns.color_palette(COLORS, len(regions)), strict=True))
    plain = {region: region if region in colors else region.partition(" (min ")[0] for region in regions}
    return {region: colors.get(name, NEUTRAL) for region, name in plain.items()}


def _panels(
    table: pd.DataFrame,
    draw: Callable[..., None],
    *,
    width: float,
    label: str,
    colors: Mapping[str, RegionColor] | None = None,
) -> Figure:
    """A panel per region, in which ``draw(axis, part, place, number of models, label=, color=)`` draws each model.

    The places of the models are centred at 0. Colours of the regions are used for a single model.
    """
    regions, models = (list(dict.fromkeys(table[column])) for column in (REGION, MODEL))
    figure = new_figure(1.2 + width * len(regions), 3.2 if len(models) == 1 else 3.6)
    axes = figure.subplots(1, len(regions), sharey=True, squeeze=False)[0]
    by_region = None if colors is None or len(models) > 1 else _region_palette(regions, colors)
    for axis, region in zip(axes, regions, strict=True):
        of_models = sns.color_palette(COLORS, len(models)) if by_region is None else [by_region[region]]
        for number, (model, color) in enumerate(zip(models, of_models, strict=True)):
            part = table[(table[REGION] == region) & (table[MODEL] == model)]
            draw(axis, part, number - (len(models) - 1) / 2, len(models), label=model, color=color)
        _finish(axis, region, grid="y")
    axes[0].set_ylabel(label)
    if len(models) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(models), 4), frameon=False)
    return figure


def _finish(axis: Axes, title: str, *, grid: Literal["x", "y"]) -> None:
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)


def _label(metric: str) -> str:
    kind = metric_named(metric)
    return f"{kind.label} ({kind.unit})"


def _scaled(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The table with values and limits in the unit of the axis."""
    if len(table) == 0:
        raise InputError("the table has no rows to draw")
    columns = [VALUE, LOW, HIGH]
    return table.assign(**(table[columns] * metric_named(metric).factor))


def _distances(table: pd.DataFrame) -> np.ndarray:
    """Error bars: how far the limits lie below and above the value, shape (2, rows)."""
    value, low, high = (table[column].to_numpy() for column in (VALUE, LOW, HIGH))
    return np.stack([value - low, high - value]).clip(0)


@literally
def similarity_maps(table: pd.DataFrame) -> Figure:
    """Cosine similarity of adapters between subsets: a panel per stage, for all weights and for the linear map alone.

    ``table`` has the columns stage, first, second, weights, map and chance. Titles have the mean size of the values off
    the diagonal and, for weights, of those of untrained adapters if known. Grey: an adapter that is still zero.
    """
    subsets, stages = list(dict.fromkeys(table["first"])), list(dict.fromkeys(table["stage"]))
    sides = [[stage for stage in stages if stage[0] == side] for side in dict.fromkeys(stage[0] for stage in stages)]
    grid = [(kind, side) for kind in ("weights", "map") for side in sides]
    columns, edge = max(map(len, sides)), 0.9 + 0.09 * len(subsets)
    figure = new_figure(1.6 + 0.06 * max(map(len, subsets)) + columns * edge, 0.8 + len(grid) * (edge + 0.35))
    axes = figure.subplots(len(grid), columns, squeeze=False, sharex=True, sharey=True)
    off_diagonal, image = ~np.eye(len(subsets), dtype=bool), None
    for row, (kind, side) in zip(axes, grid, strict=True):
        for axis in row[len(side) :]:
            axis.set_visible(False)
        for axis, stage in zip(row, side, strict=False):
            part = table[table["stage"] == stage]
            values = part.pivot(index="first", columns="second", values=kind).loc[subsets, subsets].to_numpy(float)
            axis.set_facecolor("0.8")
            image = axis.imshow(values, cmap="vlag", vmin=-1, vmax=1, aspect="auto")
            sizes = np.abs(values[off_diagonal])
            sizes = sizes[np.isfinite(sizes)]
            title = f"{stage}, {'all weights' if kind == 'weights' else 'up · down'}: "
            title += f"{sizes.mean():.3f}" if len(sizes) else "untrained"
            chance = part["chance"].iloc[0]
            title += f" (chance {chance:.3f})" if kind == "weights" and np.isfinite(chance) else ""
            axis.set_title(title, fontsize=7)
            axis.tick_params(length=0, labelsize=5)
            axis.set_xticks(range(len(subsets)), subsets, rotation=90)
            axis.set_yticks(range(len(subsets)), subsets)
    assert image is not None
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), label="cosine similarity", fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    return figure
