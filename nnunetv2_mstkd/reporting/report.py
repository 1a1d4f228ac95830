"""The files of an evaluation: results.csv, tables, figures, report.html and summary.json, and the text to print."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_mstkd.evaluation.results import CASE, FOLD, METRIC, MODALITIES, REGION, SUBSET, VALUE, write_results
from nnunetv2_mstkd.evaluation.run import Measured
from nnunetv2_mstkd.evaluation.scoring import NEAR, Rules
from nnunetv2_mstkd.images.atomic import write_json, write_text
from nnunetv2_mstkd.inference.evaluation_files import CASES, PRESENCE, REPORT, RESULTS, SUMMARY, TABLES
from nnunetv2_mstkd.inference.expected_dice import ENTROPY, LARGEST_COMPONENT, TEMPERATURE
from nnunetv2_mstkd.metrics.conventions import DICE, empty_rules_text, metric_named
from nnunetv2_mstkd.reporting import figures
from nnunetv2_mstkd.reporting.page import Pictures, case_page, html_report
from nnunetv2_mstkd.reporting.pictures import fractions, label_colors, region_colors
from nnunetv2_mstkd.reporting.tables import MARKDOWN, TEXT, finding_tables, frame_table, subset_table
from nnunetv2_mstkd.statistics.bootstrap import HIGH, LOW
from nnunetv2_mstkd.statistics.calibration import Calibration
from nnunetv2_mstkd.statistics.components import LargestComponent
from nnunetv2_mstkd.statistics.findings import Findings
from nnunetv2_mstkd.statistics.shapley import MODALITY


class Evaluation(Findings):
    """The findings of an evaluation, the output ``folder``, and the ``text`` that ``mstkd evaluate`` prints.

    ``largest_component`` says what keeping only the largest component changes; None for records of earlier versions.
    """

    def __init__(self, measured: Measured, folder: Path) -> None:
        super().__init__(measured.found.results, measured.empty_dice, measured.settings["channels"])
        largest = measured.found.largest
        self.largest_component = LargestComponent(self.results, largest) if len(largest) else None
        if self.largest_component is not None and self.largest_component.sentence is not None:
            self.notes.append(self.largest_component.sentence)
        self.folder = folder
        self.text = _text(self, measured.rules, measured.near)


def write_report(measured: Measured, output: Path, pictures: int) -> Evaluation:
    """Write all files of an evaluation to an existing folder, each atomically; ``pictures`` cases are shown."""
    evaluation = Evaluation(measured, output)
    rules, near = measured.rules, measured.near
    write_results(evaluation.results, output / RESULTS)
    for fmt, name in TABLES.items():
        write_text(output / name, _tables(evaluation.results, rules, fmt))
    drawn = _write_figures(evaluation, rules, output)
    shown = Pictures(pictures, measured.records.load_montage)
    _write_presence(measured.found.presence, output / PRESENCE)
    pages = _write_case_pages(evaluation, measured, output, shown) if pictures else {}
    calibration = Calibration(measured.found.calibration) if measured.found.calibration else None
    page = html_report(
        evaluation, rules, measured.settings, near, drawn, shown, pages=pages, presence=measured.found.presence,
        calibration=calibration, lacking=measured.found.lacking,
    )  # fmt: skip
    write_text(output / REPORT, page)
    # last: mstkd predict looks for it
    write_json(output / SUMMARY, _summary(evaluation, measured, calibration))
    return evaluation


def _write_presence(presence: pd.DataFrame, file: Path) -> None:
    """Write what a presence head said; without one there is no file."""
    if len(presence):
        write_text(file, presence.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    else:
        file.unlink(missing_ok=True)


def _write_case_pages(
    findings: Findings, measured: Measured, output: Path, pictures: Pictures
) -> dict[tuple[str, str], str]:
    """Write a page with pictures for each case that has none since its last results; paths by fold and case."""
    pages = {}
    for fold, case in dict.fromkeys(zip(findings.results[FOLD], findings.results[CASE], strict=True)):
        slices = output / CASES / f"fold_{fold}" / f"{case}.npz"
        file = slices.with_suffix(".html")
        if not slices.is_file():
            continue
        if not file.is_file() or file.stat().st_mtime < slices.stat().st_mtime:
            write_text(file, case_page(findings, measured.rules, measured.settings, pictures, fold, case))
        pages[fold, case] = file.relative_to(output).as_posix()
    return pages


def _write_figures(findings: Findings, rules: Rules, output: Path) -> dict[str, Path]:
    """Draw the figures, remove those of an earlier run with other subsets, and return the files by name."""
    of_labels = label_colors(list(rules.labels), rules.ignore_label)
    colors = {name: fractions(color) for name, color in region_colors(rules.regions, of_labels).items()}
    of_regions = partial(partial, colors=colors)
    drawings: dict[str, tuple[Callable[..., Any], pd.DataFrame | None]] = {
        "missing.png": (of_regions(figures.missing_bars), findings.missing_one),
        "heat_map.png": (figures.heat_map, findings.results),
        "curve.png": (of_regions(figures.curve_by_count), findings.by_count),
        "shapley.png": (of_regions(figures.shapley_bars), findings.shapley),
    }
    for name, (draw, table) in drawings.items():
        if table is None:
            (output / name).unlink(missing_ok=True)
        else:
            figures.save_figure(draw(table), output / name)
    return {name: output / name for name, (_, table) in drawings.items() if table is not None}


# ---- summary.json --------------------------------------------------------------------------------------------------


def _summary(findings: Evaluation, measured: Measured, calibration: Calibration | None) -> dict[str, Any]:
    rules = measured.rules
    subsets: dict[str, dict[str, dict[str, float | None]]] = {
        subset: {region: {} for region in rules.scored} for subset in findings.subsets
    }
    for row in findings.by_subset.to_dict("records"):
        subsets[row[SUBSET]][row[REGION]][row["metric"]] = _number(row[VALUE])
    overall = findings.summary.to_dict("records")
    content: dict[str, Any] = {
        "model": findings.model,
        "trainer": findings.trainer,
        "folds": findings.folds,
        "cases": len(findings.cases),
        "cases_by_subset": findings.counts,
        "patients": findings.num_patients,
        **measured.settings,
        "empty_masks": empty_rules_text(
            rules.convention, rules.metrics, lesion_convention=rules.lesion_convention
        ).splitlines(),
        "subsets": subsets,
        "ranges": _ranges(findings, measured.found.entropies),
        "calibration": None if calibration is None else _calibration(calibration),
        LARGEST_COMPONENT: None if findings.largest_component is None else _largest(findings.largest_component),
        "mean_over_subsets": {row[REGION]: _interval(row) for row in overall},
        "worst_subset": {row[REGION]: {"subset": row["worst_subset"], DICE: _number(row["worst"])} for row in overall},
        "by_number_of_modalities": _nested(findings.by_count, MODALITIES),
        "loss_against_full_input": None if findings.gap is None else _nested(findings.gap, SUBSET),
        "shapley": None if findings.shapley is None else _nested(findings.shapley, MODALITY),
        "cases_with_full_input": len(findings.full_cases),
        "headline": findings.headline,
        "warnings": findings.warnings,
        "notes": findings.notes,
    }
    if measured.near is not None:
        content["near_decision"] = {"logit": NEAR, "voxels": measured.near[0], "of": measured.near[1]}
    return content


def _ranges(findings: Findings, entropies: Mapping[str, list[float]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Lowest and highest Dice of a case by subset and region, and its entropy."""
    dice = findings.results[findings.results[METRIC] == DICE].dropna(subset=[VALUE])
    found: dict[str, dict[str, tuple[float, float]]] = {subset: {} for subset in findings.subsets}
    of_cases = dice.groupby([SUBSET, REGION, CASE], sort=False)[VALUE].mean()  # of the folds that predicted it
    for (subset, region), values in of_cases.groupby([SUBSET, REGION], sort=False):
        found[subset][region] = float(values.min()), float(values.max())
    for subset, values in entropies.items():
        if values:
            found[subset][ENTROPY] = min(values), max(values)
    return found


def _calibration(found: Calibration) -> dict[str, Any]:
    """Expected calibration errors by subset and region, as is and with the temperatures, and these by number."""
    errors = {
        key: {
            subset: {region: _number(found.error(subset, region, calibrated=calibrated)) for region in regions}
            for subset, regions in found.counts.items()
        }
        for key, calibrated in (("expected_calibration_error", False), ("with_temperature", True))
    }
    return {**errors, TEMPERATURE: {str(size): value for size, value in found.temperatures.items()}}


def _largest(found: LargestComponent) -> dict[str, Any]:
    return {
        "subsets": {
            subset: {region: {DICE: _number(value)} for region, value in regions.items()}
            for subset, regions in found.by_subset.items()
        },
        "difference": {DICE: _number(found.difference), LOW: _number(found.low), HIGH: _number(found.high)},
        "cases": found.cases,
        "better": found.better,
        "worse": found.worse,
        "undefined": found.undefined,
    }


def _nested(table: pd.DataFrame, column: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """region -> value of ``column`` -> value with its interval."""
    nested: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in table.to_dict("records"):
        nested.setdefault(row[REGION], {})[str(row[column])] = _interval(row)
    return nested


def _interval(row: Mapping[Hashable, Any]) -> dict[str, float | None]:
    return {DICE: _number(row[VALUE]), LOW: _number(row[LOW]), HIGH: _number(row[HIGH])}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


# ---- tables and text -----------------------------------------------------------------------------------------------


def _tables(results: pd.DataFrame, rules: Rules, fmt: str) -> str:
    mark = "##" if fmt == MARKDOWN else "%"
    return "\n".join(
        f"{mark} {metric_named(name).label}\n\n{_table(results, rules, name, fmt)}\n" for name in rules.metrics
    )


def _table(results: pd.DataFrame, rules: Rules, metric: str, fmt: str) -> str:
    return subset_table(results, metric=metric, fmt=fmt, **rules.note)


def _text(findings: Findings, rules: Rules, near: tuple[int, int] | None) -> str:
    """All findings, as printed."""
    parts = [] if findings.headline is None else [findings.headline]
    parts += [f"{metric_named(name).label}\n\n{_table(findings.results, rules, name, TEXT)}" for name in rules.metrics]
    for title, table, patients in finding_tables(findings):
        interval = f"95 % interval over {patients} patients" if patients > 1 else "one patient, no interval"
        parts.append(f"{title} ({interval})\n\n{frame_table(table, fmt=TEXT)}")
    if near is not None:
        parts.append(
            f"{near[0]} of {near[1]} voxels ({near[0] / max(near[1], 1):.2g} of all) lie within {NEAR:g} logit of the "
            f"decision. Predicting several subsets at once changes logits by rounding, so only these may differ from "
            f"--stack 1"
        )
    parts += [f"note: {text}" for text in findings.notes]
    parts += [f"warning: {text}" for text in findings.warnings]
    return "\n\n".join(parts)
