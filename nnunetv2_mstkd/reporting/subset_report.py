"""What an evaluation of subsets leaves behind: results.csv, summary.json, tables, figures, report, text to print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_mstkd.evaluation.files import FIGURES, REPORT, RESULTS, SUMMARY, TABLES
from nnunetv2_mstkd.evaluation.results import METRIC, MODALITIES, REGION, SUBSET, VALUE, write_results, write_text
from nnunetv2_mstkd.evaluation.scoring import NEAR, Rules
from nnunetv2_mstkd.inference.record import write_json
from nnunetv2_mstkd.metrics.conventions import DICE, empty_rules_text, metric_named
from nnunetv2_mstkd.reporting.findings import Findings, overall_table, spread_table
from nnunetv2_mstkd.reporting.report import Strips, html_report
from nnunetv2_mstkd.reporting.tables import frame_table, subset_table
from nnunetv2_mstkd.statistics.shapley import MODALITY
from nnunetv2_mstkd.statistics.tests import HIGH, LOW


def write_report(
    results: pd.DataFrame,
    output: Path,
    rules: Rules,
    run: Mapping[str, Any],
    near: tuple[int, int] | None,
    strips: Strips,
) -> str:
    """Write all files of an evaluation and return the text to print.

    Parameters
    ----------
    results:
        of one model; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    output:
        an existing folder. Each file is at any moment absent, the old or the whole new one.
    rules:
        that the values were computed with.
    run:
        what was evaluated and how, for summary.json.
    near:
        voxels near the decision and all voxels; None: images were predicted with one subset at a time.
    strips:
        how many cases to show, and where their pictures are.
    """
    # here, because it brings matplotlib
    from nnunetv2_mstkd.reporting.figures import curve_by_count, heat_map, save_figure, shapley_bars

    findings = Findings(results)
    write_results(results, output / RESULTS)
    for fmt, name in TABLES.items():
        write_text(_tables(results, rules, fmt), output / name)
    figures = {"heat_map.png": lambda: heat_map(results), "curve.png": lambda: curve_by_count(findings.by_count)}
    if findings.shapley is not None:
        figures["shapley.png"] = lambda: shapley_bars(findings.shapley)
    for name in FIGURES:
        if name in figures:
            save_figure(figures[name](), output / name)
        else:
            (output / name).unlink(missing_ok=True)  # of an earlier run with other subsets
    pictures = {name: output / name for name in FIGURES if name in figures}
    write_text(html_report(findings, rules, run, near, pictures, strips), output / REPORT)
    # last: mstkd predict looks for it
    write_json(output / SUMMARY, _summary(findings, rules, run, near))
    return _text(findings, rules, near)


# ---- summary.json --------------------------------------------------------------------------------------------------


def _summary(findings: Findings, rules: Rules, run: Mapping[str, Any], near: tuple[int, int] | None) -> dict[str, Any]:
    results = findings.results
    means = results.groupby([SUBSET, REGION, METRIC], sort=False)[VALUE].mean()
    subsets: dict[str, dict[str, dict[str, float | None]]] = {
        subset: {region: {} for region in rules.regions} for subset in findings.subsets
    }
    for (subset, region, metric), value in means.items():
        subsets[subset][region][metric] = _number(value)
    content: dict[str, Any] = {
        "model": findings.model,
        "trainer": findings.trainer,
        "folds": findings.folds,
        "cases": len(findings.cases),
        "patients": findings.num_patients,
        **run,
        "empty_masks": empty_rules_text(
            rules.convention, rules.metrics, lesion_convention=rules.lesion_convention
        ).splitlines(),
        "subsets": subsets,
        "mean_over_subsets": {row[REGION]: _interval(row) for row in _rows(findings.summary)},
        "worst_subset": {
            row[REGION]: {"subset": row["worst_subset"], DICE: _number(row["worst"])} for row in _rows(findings.summary)
        },
        "by_number_of_modalities": _nested(findings.by_count, MODALITIES),
        "loss_against_full_input": None if findings.gap is None else _nested(findings.gap, SUBSET),
        "shapley": None if findings.shapley is None else _nested(findings.shapley, MODALITY),
        "warnings": findings.warnings,
    }
    if near is not None:
        content["near_decision"] = {"logit": NEAR, "voxels": near[0], "of": near[1]}
    return content


def _nested(table: pd.DataFrame, column: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """region -> what stands in ``column`` -> value with its interval."""
    nested: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in _rows(table):
        nested.setdefault(row[REGION], {})[str(row[column])] = _interval(row)
    return nested


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")


def _interval(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {DICE: _number(row[VALUE]), LOW: _number(row[LOW]), HIGH: _number(row[HIGH])}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


# ---- tables and text -----------------------------------------------------------------------------------------------


def _tables(results: pd.DataFrame, rules: Rules, fmt: str) -> str:
    parts = []
    for name in rules.metrics:
        title = metric_named(name).label
        heading = f"## {title}" if fmt == "markdown" else f"% {title}"
        parts.append(f"{heading}\n\n{_table(results, rules, name, fmt)}\n")
    return "\n".join(parts)


def _table(results: pd.DataFrame, rules: Rules, metric: str, fmt: str = "markdown") -> str:
    return subset_table(
        results, metric=metric, fmt=fmt, convention=rules.convention, lesion_convention=rules.lesion_convention
    )


def _text(findings: Findings, rules: Rules, near: tuple[int, int] | None) -> str:
    """All findings, as printed at the end."""
    parts = [f"{metric_named(name).label}\n\n{_table(findings.results, rules, name)}" for name in rules.metrics]
    interval = f"95 % interval over {findings.num_patients} patients"
    table = frame_table(overall_table(findings.summary))
    parts.append(f"Dice over all evaluated subsets ({interval}), and the worst subset\n\n{table}")
    if findings.by_count[MODALITIES].nunique() > 1:
        table = frame_table(spread_table(findings.by_count, MODALITIES))
        parts.append(f"Dice by number of modalities ({interval})\n\n{table}")
    if findings.gap is not None:
        table = frame_table(spread_table(findings.gap, SUBSET))
        parts.append(f"Points of Dice lost against the full input ({interval})\n\n{table}")
    if findings.shapley is not None:
        table = frame_table(spread_table(findings.shapley, MODALITY))
        parts.append(f"What each modality is worth: exact Shapley values, points of Dice ({interval})\n\n{table}")
    if near is not None:
        parts.append(
            f"{near[0]} of {near[1]} voxels ({near[0] / max(near[1], 1):.2g} of all) lie within {NEAR:g} logit of the "
            f"decision; only these may differ from --stack 1"
        )
    parts += [f"warning: {text}" for text in findings.warnings]
    return "\n\n".join(parts)
