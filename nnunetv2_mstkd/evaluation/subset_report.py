"""What an evaluation of subsets leaves behind: results.csv, summary.json, tables, figures, and a text to print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.conventions import DICE, empty_rules_text, metric_named
from nnunetv2_mstkd.evaluation.files import FIGURES, RESULTS, SUMMARY, TABLES
from nnunetv2_mstkd.evaluation.plausibility import plausibility_warnings
from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODALITIES,
    MODEL,
    REGION,
    SEPARATOR,
    SUBSET,
    TRAINER,
    VALUE,
    modality_order,
    patients_of,
    subset_order,
    write_results,
    write_text,
)
from nnunetv2_mstkd.evaluation.scoring import NEAR, Rules
from nnunetv2_mstkd.evaluation.shapley import MAX_PLAYERS, MODALITY, shapley
from nnunetv2_mstkd.evaluation.statistics import HIGH, LOW, gap_to_full, mean_by_count, summary
from nnunetv2_mstkd.evaluation.tables import frame_table, subset_table
from nnunetv2_mstkd.inference.record import write_json


class Findings:
    """Everything that is computed from the table of results of one model; intervals are 95 %, over patients.

    Attributes
    ----------
    summary, by_count:
        of the Dice; see :mod:`~nnunetv2_mstkd.evaluation.statistics`.
    gap, shapley:
        of the Dice; None where the subsets that they need were not evaluated.
    warnings:
        results that contradict what the modalities show.
    """

    def __init__(self, results: pd.DataFrame) -> None:
        self.results = results
        self.subsets = list(subset_order(results[SUBSET], modality_order(results[SUBSET])))
        self.patients = patients_of(results[CASE].unique())
        modalities = modality_order(self.subsets)
        self.summary = summary(results, patients=self.patients)
        self.by_count = mean_by_count(results, patients=self.patients)
        full = SEPARATOR.join(modalities) in self.subsets
        self.gap = gap_to_full(results, patients=self.patients) if full and len(self.subsets) > 1 else None
        complete = len(self.subsets) == 2 ** len(modalities) - 1 and 1 < len(modalities) <= MAX_PLAYERS
        self.shapley = shapley(results, patients=self.patients) if complete else None
        self.warnings = plausibility_warnings(results)

    @property
    def num_patients(self) -> int:
        return len(set(self.patients.values()))


def write_report(
    results: pd.DataFrame, output: Path, rules: Rules, run: Mapping[str, Any], near: tuple[int, int] | None
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
    """
    # here, because it brings matplotlib
    from nnunetv2_mstkd.evaluation.figures import curve_by_count, heat_map, save_figure, shapley_bars

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
        "model": str(results[MODEL].iloc[0]),
        "trainer": str(results[TRAINER].iloc[0]),
        "folds": sorted(results[FOLD].unique()),
        "cases": int(results[CASE].nunique()),
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
    parts.append(f"Dice over all evaluated subsets ({interval}), and the worst subset\n\n{_overall(findings.summary)}")
    if findings.by_count[MODALITIES].nunique() > 1:
        table = _spread(findings.by_count, MODALITIES)
        parts.append(f"Dice by number of modalities ({interval})\n\n{table}")
    if findings.gap is not None:
        table = _spread(findings.gap, SUBSET)
        parts.append(f"Points of Dice lost against the full input ({interval})\n\n{table}")
    if findings.shapley is not None:
        table = _spread(findings.shapley, MODALITY)
        parts.append(f"What each modality is worth: exact Shapley values, points of Dice ({interval})\n\n{table}")
    if near is not None:
        parts.append(
            f"{near[0]} of {near[1]} voxels ({near[0] / max(near[1], 1):.2g} of all) lie within {NEAR:g} logit of the "
            f"decision; only these may differ from --stack 1"
        )
    parts += [f"warning: {text}" for text in findings.warnings]
    return "\n\n".join(parts)


def _overall(table: pd.DataFrame) -> str:
    rows = [(row[REGION], _percent(row), f"{row['worst_subset']} ({_points(row['worst'])})") for row in _rows(table)]
    return frame_table(pd.DataFrame(rows, columns=["region", "mean", "worst subset"]))


def _spread(table: pd.DataFrame, column: str) -> str:
    """A row per value of ``column`` and a column per region, in percent with the interval."""
    regions = list(dict.fromkeys(table[REGION]))
    cells = {(row[column], row[REGION]): _percent(row) for row in _rows(table)}
    rows = [(str(key), *(cells[key, region] for region in regions)) for key in dict.fromkeys(table[column])]
    return frame_table(pd.DataFrame(rows, columns=[column, *regions]))


def _percent(row: Mapping[str, Any]) -> str:
    limits = "" if not np.isfinite(row[LOW]) else f" [{_points(row[LOW])}, {_points(row[HIGH])}]"
    return f"{_points(row[VALUE])}{limits}"


def _points(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{round(100 * value, 1) + 0.0:.1f}"  # no -0.0
