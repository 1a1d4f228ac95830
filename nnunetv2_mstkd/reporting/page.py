"""``report.html``: an evaluation as a single, self-contained page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.montage import ENTROPY_STEP, Montage
from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    REGION,
    SEPARATOR,
    SUBSET,
    VALUE,
    modality_order,
    subset_size,
)
from nnunetv2_mstkd.evaluation.scoring import NEAR, Rules
from nnunetv2_mstkd.inference.evaluation_files import REPORT, RESULTS, SUMMARY, TABLES
from nnunetv2_mstkd.metrics.conventions import DICE, metric_named, postprocessed_regions
from nnunetv2_mstkd.reporting.html import render
from nnunetv2_mstkd.reporting.pictures import (
    clearest_image,
    cropped,
    file_uri,
    grey_uri,
    heat_uri,
    label_colors,
    outline_of,
    overlay_uri,
)
from nnunetv2_mstkd.reporting.tables import (
    about_data,
    calibration_table,
    finding_tables,
    points,
    presence_table,
    subset_content,
)
from nnunetv2_mstkd.statistics.calibration import Calibration
from nnunetv2_mstkd.statistics.findings import Findings

WIDE = 16
"""From this number of subsets on, a table has a row per subset instead of a column, and only one case is unfolded."""

FIGURE_TITLES = {
    "missing.png": "Loss of Dice when one modality is missing",
    "heat_map.png": "Dice of every subset and region",
    "curve.png": "Dice against the number of modalities",
    "shapley.png": "Contribution of each modality: exact Shapley values of the Dice",
}


ABSENT = "*"
"""Marks the values of a region that the reference lacks."""

LEAD = "missing.png"
"""Stands first on the page, with the headline."""


@dataclass(frozen=True)
class Pictures:
    """Which cases are pictured."""

    number: int
    """Number of cases: 1 is the worst, 2 are the worst and the best, more are spread between them."""
    load: Callable[[str, str], Montage | None]
    """Returns the pictures of a case by fold and name; None if it has none."""


def html_report(
    findings: Findings,
    rules: Rules,
    run: Mapping[str, Any],
    near: tuple[int, int] | None,
    figures: Mapping[str, Path],
    pictures: Pictures,
    *,
    pages: Mapping[tuple[str, str], str] | None = None,
    presence: pd.DataFrame | None = None,
    calibration: Calibration | None = None,
    lacking: Mapping[tuple[str, str], Sequence[str]] | None = None,
    now: datetime | None = None,
) -> str:
    """The page as HTML.

    Parameters
    ----------
    findings, rules, run, near:
        What was found about a model, and how it was evaluated; see :class:`~nnunetv2_mstkd.evaluation.run.Measured`,
        where ``run`` is ``settings``.
    figures:
        PNG files by their names in :data:`FIGURE_TITLES`.
    pictures:
        The cases that are pictured.
    pages:
        Pages of further cases by fold and name, from :func:`case_page`.
    presence:
        What the model's presence head says; see :class:`~nnunetv2_mstkd.evaluation.records.Collected`. None or empty:
        it has none.
    calibration:
        Calibration of the model; None: it was not counted.
    lacking:
        Regions that the reference lacks, by fold and case.
    now:
        Date of the page; default today.
    """
    cases = _case_means(findings)
    folds = ", ".join(findings.folds)
    named = findings.model if findings.model.startswith(findings.trainer) else f"{findings.model}: {findings.trainer}"
    return render(
        "report.html",
        now=now,
        title=f"{named}, fold{'s' if len(findings.folds) > 1 else ''} {folds}",
        findings=findings,
        data=about_data(run.get("dataset"), run.get("description")),
        tables=[_subset_table(findings, rules, metric) for metric in rules.metrics],
        summaries=list(finding_tables(findings)),
        presence=None if presence is None or presence.empty else presence_table(presence, findings.subsets),
        calibration=None if calibration is None else calibration_table(calibration),
        figures=[
            {"name": name.removesuffix(".png"), "title": title, "source": file_uri(figures[name])}
            for name, title in FIGURE_TITLES.items()
            if name in figures and name != LEAD
        ],
        lead=file_uri(figures[LEAD]) if LEAD in figures else None,
        lead_title=FIGURE_TITLES[LEAD],
        montages=[
            _montage(number, place, findings, rules, pictures) for number, place in enumerate(_places(cases, pictures))
        ],
        legend=_legend(rules),
        many=len(findings.subsets) >= WIDE,
        channels=list(run["channels"]),
        worst=_worst_cases(cases, findings, rules, lacking or {}),
        absent=ABSENT if lacking else None,
        links=_links(cases, pictures, pages or {}),
        files=[RESULTS, SUMMARY, *TABLES.values()],
        settings=[(key.replace("_", " "), _words(value)) for key, value in run.items()],
        near=None if near is None else {"voxels": near[0], "of": near[1], "logit": NEAR},
    )


def case_page(
    findings: Findings, rules: Rules, run: Mapping[str, Any], pictures: Pictures, fold: str, case: str
) -> str:
    """The pictures of one case as a page of its own; parameters as for :func:`html_report`."""
    table = findings.results
    dice = table[(table[METRIC] == DICE) & (table[FOLD] == fold) & (table[CASE] == case)]
    mean = dice.loc[~dice[REGION].isin(postprocessed_regions(dice[REGION].unique())), VALUE].mean()
    return render(
        "case.html",
        title=f"{case} (fold {fold})",
        model=f"{findings.model}: {findings.trainer}",
        report=f"../../{REPORT}",
        montage=_montage(0, (fold, case, "", mean), findings, rules, pictures),
        legend=_legend(rules),
        channels=list(run["channels"]),
    )


def _links(cases: pd.DataFrame, pictures: Pictures, pages: Mapping[tuple[str, str], str]) -> list[str | None]:
    """Where each case of the table is pictured: on this page, on its own, or nowhere."""
    here = {(fold, case): f"#montage-{number}" for number, (fold, case, *_) in enumerate(_places(cases, pictures))}
    return [here.get(place) or (quote(pages[place]) if place in pages else None) for place in cases.index]


def _words(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


# ---- tables --------------------------------------------------------------------------------------------------------


def _subset_table(findings: Findings, rules: Rules, metric: str) -> dict[str, Any]:
    content = subset_content(findings.results, metric=metric, **rules.note)
    return {
        "title": metric_named(metric).label,
        "modalities": content.data.modalities,
        "subsets": content.data.subsets,
        "regions": content.data.regions,
        "available": content.available.tolist(),
        "texts": content.texts[0].tolist(),
        "counts": [] if content.data.complete else content.data.counts.tolist(),
        "notes": content.notes,
        "long": len(content.data.subsets) >= WIDE,
    }


# ---- cases ---------------------------------------------------------------------------------------------------------


def _case_means(findings: Findings) -> pd.DataFrame:
    """Dice of each case (index: fold and case), worst first.

    Columns: each region's mean over the subsets; ``mean`` of all; ``worst`` subset and ``worst_value``, its mean over
    the regions; ``full``, the same with all modalities, NaN where they were not evaluated; ``lacks``, as text the
    modalities that no evaluated subset of the case has.
    """
    of_all = findings.results[findings.results[METRIC] == DICE]
    keys, regions = [FOLD, CASE], list(dict.fromkeys(of_all[REGION]))
    by_region = of_all.groupby([*keys, REGION], sort=False)[VALUE].mean().unstack(REGION)
    dice = of_all[~of_all[REGION].isin(postprocessed_regions(regions))]
    by_subset = dice.groupby([*keys, SUBSET], sort=False)[VALUE].mean().unstack(SUBSET)[findings.subsets]
    table = pd.DataFrame(index=by_region.index)
    table["mean"] = dice.groupby(keys, sort=False)[VALUE].mean()
    filled = by_subset.fillna(np.inf)
    table["worst"], table["worst_value"] = filled.idxmin(axis=1), by_subset.min(axis=1)
    table["full"] = by_subset[findings.subsets[-1]] if findings.gap is not None else math.nan
    everything = modality_order(findings.subsets)
    subsets_of = dice.groupby(keys, sort=False)[SUBSET].unique()
    table["lacks"] = [
        ", ".join(name for name in everything if name not in SEPARATOR.join(subsets).split(SEPARATOR))
        for subsets in subsets_of.loc[table.index]
    ]
    # under separate keys: a region may have the name of a column
    table = pd.concat({"case": table, "region": by_region[regions]}, axis=1)
    return table.sort_values(("case", "mean"), kind="stable")


def _worst_cases(
    cases: pd.DataFrame, findings: Findings, rules: Rules, lacking: Mapping[tuple[str, str], Sequence[str]]
) -> dict[str, Any]:
    """All cases, worst first: column heads, and rows of text with the values to sort by.

    Values of regions that the reference of a case lacks are marked.
    """
    full = findings.gap is not None
    several = len(findings.subsets) > 1
    heads = ["case", "fold", "mean", *rules.scored]
    heads += ["worst subset", "its mean"] if several else []
    heads += ["full input"] if full else []
    heads += [] if findings.complete else ["lacks"]
    rows = []
    for (fold, case), row in zip(cases.index, cases.to_dict("records"), strict=True):
        cells = [{"text": case, "key": None}, {"text": fold, "key": None}, _cell(row["case", "mean"])]
        for region, plain in rules.plain.items():
            cell = _cell(row["region", region])
            absent = plain in lacking.get((fold, case), ())
            cells.append({**cell, "text": cell["text"] + ABSENT} if absent else cell)
        if several:
            cells += [{"text": row["case", "worst"], "key": None}, _cell(row["case", "worst_value"])]
        cells += [_cell(row["case", "full"])] if full else []
        rows.append(cells if findings.complete else [*cells, {"text": row["case", "lacks"], "key": None}])
    return {"heads": heads, "rows": rows}


def _cell(value: float) -> dict[str, Any]:
    """A number as text, and as the key by which the column is sorted; it is None in cells of text."""
    return {"text": points(value), "key": "" if math.isnan(value) else value}


def _places(cases: pd.DataFrame, pictures: Pictures) -> list[tuple[str, str, str, float]]:
    """Fold, case, rank in words and mean Dice of the cases that are pictured."""
    # a case without a value is neither the worst nor the best
    valued = cases[cases["case", "mean"].notna()]
    cases = valued if len(valued) else cases
    number = min(pictures.number, len(cases))
    found = []
    for place in np.unique(np.linspace(0, len(cases) - 1, number).round().astype(int)) if number else []:
        fold, case = cases.index[place]
        found.append((fold, case, _rank(int(place), len(cases), number), cases["case", "mean"].iloc[place]))
    return found


def _rank(place: int, of: int, number: int) -> str:
    if place == 0:
        return "worst"
    if place == of - 1:
        return "best"
    if number % 2 and place == round((of - 1) / 2):
        return "median"
    return f"number {place + 1} of {of} from the worst"


def _montage(
    number: int, place: tuple[str, str, str, float], findings: Findings, rules: Rules, pictures: Pictures
) -> dict[str, Any]:
    fold, case, rank, mean = place
    about = {"number": number, "case": case, "fold": fold, "rank": rank, "mean": points(mean)}
    stored = pictures.load(fold, case)
    if stored is None:
        return {**about, "groups": None}
    montage = cropped(stored)
    colors = label_colors(list(rules.labels), rules.ignore_label)
    slices = montage.every
    outlines = [outline_of(~np.isin(each.reference, (0, rules.ignore_label or 0))) for each in slices]
    dice = findings.results.query(f"{METRIC} == @DICE and {FOLD} == @fold and {CASE} == @case")
    values = dict(zip(zip(dice[SUBSET], dice[REGION], strict=True), dice[VALUE], strict=True))
    groups: dict[int, list[dict[str, Any]]] = {}
    for subset in findings.subsets:
        # of a case that has lost a modality, pictures of an earlier run may be there
        if subset in montage.segmentations and (subset, next(iter(rules.regions))) in values:
            picture = {
                "name": subset,
                "sources": [
                    overlay_uri(each.segmentations[subset], colors, outline)
                    for each, outline in zip(slices, outlines, strict=True)
                ],
                "entropies": [heat_uri(each.entropies[subset]) for each in slices]
                if all(subset in each.entropies for each in slices)  # kept by an earlier version
                else [],
                "values": [(region, points(values[subset, region])) for region in rules.scored],
            }
            groups.setdefault(subset_size(subset), []).append(picture)
    shown = clearest_image(montage)
    return {
        **about,
        "slices": [each.index + 1 for each in slices],
        "first": [each.index for each in slices].index(montage.index),
        "depth": montage.depth,
        "aspect": f"{montage.reference.shape[1]} / {montage.reference.shape[0]}",
        "backgrounds": [grey_uri(each.images[shown]) for each in slices],
        "images": [
            [grey_uri(each.images[channel]) for each in slices] if montage.images[channel].any() else None
            for channel in range(len(montage.images))
        ],
        "shown": shown,
        "reference": [overlay_uri(each.reference, colors) for each in slices],
        "scale": heat_uri(np.arange(0, 101, ENTROPY_STEP)[None]) if montage.entropies else None,
        "groups": [(f"{size} modalit{'y' if size == 1 else 'ies'}", of_size) for size, of_size in groups.items()],
    }


def _legend(rules: Rules) -> list[dict[str, str]]:
    """Colour and name of each label: the regions that it belongs to."""
    entries = []
    for label, color in label_colors(list(rules.labels), rules.ignore_label).items():
        regions = [region for region, labels in rules.regions.items() if label in labels]
        name = "not counted" if label == rules.ignore_label else ", ".join(regions) or f"label {label}"
        entries.append({"color": "#{:02x}{:02x}{:02x}".format(*color), "name": name})
    return entries
