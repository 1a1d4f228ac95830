"""What a comparison of models leaves behind: a page in Markdown, all numbers as JSON, a figure, and a text to print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

import nnunetv2_mstkd
from nnunetv2_mstkd.evaluation.results import MODALITIES, MODEL, REGION, SUBSET, write_text
from nnunetv2_mstkd.metrics.conventions import Metric, metric_named
from nnunetv2_mstkd.reporting.tables import escaped, frame_table
from nnunetv2_mstkd.statistics.comparison import Comparison, MetricComparison
from nnunetv2_mstkd.statistics.tests import AGAINST, DIFFERENCE, HIGH, LOW, P_CORRECTED, P

PAGE = "comparison.md"
NUMBERS = "comparison.json"
FIGURE = "comparison.png"


def write_comparison(comparison: Comparison, output: Path) -> str:
    """Write all files of a comparison and return the text to print.

    Parameters
    ----------
    comparison:
        of two or more models.
    output:
        a folder, made if absent. Each file is at any moment absent, the old or the whole new one.
    """
    # here, because it brings matplotlib
    from nnunetv2_mstkd.reporting.figures import differences_plot, save_figure

    part = comparison.parts[0]
    save_figure(differences_plot(part.overall, part.by_count, part.by_subset, metric=part.metric), output / FIGURE)
    write_text(json.dumps(_numbers(comparison), indent=2) + "\n", output / NUMBERS)
    write_text(_page(comparison), output / PAGE)
    return _text(comparison)


# ---- numbers -------------------------------------------------------------------------------------------------------


def _numbers(comparison: Comparison) -> dict[str, Any]:
    return {
        "package_version": nnunetv2_mstkd.__version__,
        "models": comparison.about(),
        "cases": comparison.cases,
        "patients": comparison.num_patients,
        "subsets": list(comparison.subsets),
        "bootstrap": {
            "unit": "patient",
            "samples": comparison.samples,
            "seed": comparison.seed,
            "level": comparison.level,
        },
        "test": "two-sided Wilcoxon signed-rank test on the patients' mean differences; Holm's correction",
        "notes": comparison.notes,
        "metrics": {
            part.metric: {
                "better": {1: "higher", -1: "lower", 0: "closer to zero"}[metric_named(part.metric).better],
                "overall": _records(part.overall),
                "by_number_of_modalities": _records(part.by_count),
                "subsets": _records(part.by_subset),
                "per_case": _records(part.per_case),
            }
            for part in comparison.parts
        },
        "ranks": None if comparison.ranks is None else _records(comparison.ranks),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in table.to_dict("records")
    ]


# ---- text ----------------------------------------------------------------------------------------------------------


def _page(comparison: Comparison) -> str:
    names = " against ".join(escaped(each.name, "markdown") for each in comparison.evaluations)
    lines = [f"# {names}", "", _compared(comparison), "", _models(comparison), "", *_bullets(comparison.notes)]
    for part in comparison.parts:
        metric = metric_named(part.metric)
        lines += [f"## {metric.label}", "", _direction(metric), ""]
        lines += ["### Mean over all subsets", "", _overall(part), ""]
        lines += ["### By number of modalities", "", _differences(part.by_count, MODALITIES, metric), ""]
        lines += ["### By subset", "", _differences(part.by_subset, SUBSET, metric), ""]
    if comparison.ranks is not None:
        lines += ["## Ranks", "", _ranks(comparison), "", _about_ranks(comparison), ""]
    label = metric_named(comparison.parts[0].metric).label
    lines += [f"![Differences of {label} with intervals]({FIGURE})", "", *_method(comparison)]
    return "\n".join(lines) + "\n"


def _text(comparison: Comparison) -> str:
    """The short version, as printed."""
    parts = [_compared(comparison)]
    for part in comparison.parts:
        metric = metric_named(part.metric)
        counts = part.by_count[part.by_count[REGION] == part.by_count[REGION].iloc[-1]]
        parts.append(f"{metric.label}: {_direction(metric)}\n\n{_overall(part)}")
        region = counts[REGION].iloc[0]
        parts.append(f"by number of modalities, {region}\n\n{_differences(counts, MODALITIES, metric)}")
    if comparison.ranks is not None:
        parts.append(f"{_ranks(comparison)}\n\n{_about_ranks(comparison)}")
    parts += [f"note: {note}" for note in comparison.notes]
    return "\n\n".join(parts)


def _compared(comparison: Comparison) -> str:
    cases, patients, subsets = len(comparison.cases), comparison.num_patients, len(comparison.subsets)
    return (
        f"Compared on {cases} case{_s(cases)} of {patients} patient{_s(patients)}, {subsets} subset{_s(subsets)} of "
        f"modalities."
    )


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _models(comparison: Comparison) -> str:
    rows = [
        (each["model"], each["trainer"], " ".join(each["folds"]), each["cases"], len(each["not_compared"]))
        for each in comparison.about()
    ]
    return frame_table(pd.DataFrame(rows, columns=["model", "trainer", "folds", "cases", "of these not compared"]))


def _direction(metric: Metric) -> str:
    unit = "points" if metric.unit == "%" else metric.unit
    better = {1: "a positive one is a gain", -1: "a negative one is a gain", 0: "of sizes; a negative one is a gain"}
    return f"differences (model - against) in {unit}; {better[metric.better]}"


def _overall(part: MetricComparison) -> str:
    metric = metric_named(part.metric)
    rows = [
        (row[MODEL], row[AGAINST], row[REGION], _interval(row, metric), row[P], row[P_CORRECTED])
        for row in part.overall.to_dict("records")
    ]
    columns = [MODEL, AGAINST, REGION, "difference [interval]", P, "p (Holm)"]
    return _table(rows, columns)


def _differences(table: pd.DataFrame, column: str, metric: Metric) -> str:
    """A row per pair and value of ``column``, and two columns per region: difference and corrected p-value."""
    regions = list(dict.fromkeys(table[REGION]))
    several = len(table[[MODEL, AGAINST]].drop_duplicates()) > 1
    rows = []
    for (model, against, key), group in table.groupby([MODEL, AGAINST, column], sort=False):
        by_region = {row[REGION]: row for row in group.to_dict("records")}
        cells: list[Any] = [model, against] if several else []
        cells.append(str(key))
        for region in regions:
            cells += [_interval(by_region[region], metric), by_region[region][P_CORRECTED]]
        rows.append(tuple(cells))
    heads = [MODEL, AGAINST] if several else []
    heads.append(column)
    for region in regions:
        heads += [region, "p (Holm)"]
    return _table(rows, heads)


def _ranks(comparison: Comparison) -> str:
    assert comparison.ranks is not None
    rows = [
        (
            row["rank"],
            row[MODEL],
            f"{row['mean_rank']:.2f}",
            "-" if math.isnan(row[LOW]) else f"{row[LOW]:.0f} to {row[HIGH]:.0f}",
            f"{100 * row['first']:.0f} %",
        )
        for row in comparison.ranks.to_dict("records")
    ]
    return _table(rows, ["rank", MODEL, "mean rank", "interval of the rank", "first in resamples"])


def _about_ranks(comparison: Comparison) -> str:
    labels = ", ".join(metric_named(name).label for name in comparison.metrics)
    return f"Ranked within each case, subset and region by {labels}; the ranking is repeated on resampled patients."


def _method(comparison: Comparison) -> list[str]:
    return _bullets(
        [
            f"Intervals: {100 * comparison.level:g} %, {comparison.samples} resamples of patients (seed "
            f"{comparison.seed}), each of which brings all its cases. Where subsets or numbers of modalities are "
            f"tested together, the level of an interval is that of Holm's procedure at its p-value.",
            "p: two-sided Wilcoxon signed-rank test on the mean differences of patients. p (Holm): corrected within "
            "its table, over all its rows and regions; in tables by subset or number within each pair of models.",
            "Research use. The numbers describe these cases; they say nothing about other scanners, sites or patients, "
            "and nothing about clinical benefit.",
        ]
    )


def _bullets(sentences: list[str]) -> list[str]:
    return [*(f"* {escaped(sentence, 'markdown')}" for sentence in sentences), *([""] if sentences else [])]


def _table(rows: list[tuple], columns: list[str]) -> str:
    """A table whose column names may stand twice; floats are p-values."""
    text: Callable[[Any], str] = lambda value: _p(value) if isinstance(value, float) else str(value)  # noqa: E731
    return frame_table(pd.DataFrame([[text(value) for value in row] for row in rows], columns=columns))


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _interval(row: dict[str, Any], metric: Metric) -> str:
    factor = 100 if metric.unit == "%" else 1
    value, low, high = (row[key] * factor for key in (DIFFERENCE, LOW, HIGH))
    if math.isnan(value):
        return "-"
    limits = "" if math.isnan(low) else f" [{_signed(low)}, {_signed(high)}]"
    return f"{_signed(value)}{limits}"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no -0.00
