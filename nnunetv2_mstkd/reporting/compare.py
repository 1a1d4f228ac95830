"""Compare evaluated models case by case: a page in Markdown, all numbers as JSON, a figure, and the text to print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import nnunetv2_mstkd
from nnunetv2_mstkd.errors import ExistingFileError
from nnunetv2_mstkd.evaluation.results import METRIC, MODALITIES, MODEL, REGION, SUBSET
from nnunetv2_mstkd.images.atomic import write_json, write_text
from nnunetv2_mstkd.metrics.conventions import Metric, metric_named
from nnunetv2_mstkd.reporting.tables import MARKDOWN, NO_VALUE, P_HOLM, TEXT, escaped, estimate, frame_table, number
from nnunetv2_mstkd.statistics.bootstrap import HIGH, LOW
from nnunetv2_mstkd.statistics.comparison import Comparison, Models, read_evaluations
from nnunetv2_mstkd.statistics.significance import AGAINST, BY_TRAINING, DIFFERENCE, P_CORRECTED, P

PAGE = "comparison.md"
NUMBERS = "comparison.json"
FIGURE = "comparison.png"


class ModelComparison(Comparison):
    """A comparison of models; its tables are pandas data frames."""

    @property
    def text(self) -> str:
        """The comparison in short, as ``mstkd compare`` prints it."""
        return _text(self)


def compare(
    models: Models,
    *,
    metrics: Sequence[str] = ("dice",),
    baseline: str | None = None,
    output: Path | str | None = None,
) -> ModelComparison:
    """Compare two or more evaluated models case by case, over all subsets of modalities.

    Parameters
    ----------
    models:
        Path by name, ``{"ours": path, ...}``, or a list of paths, whose models have the names in their results. A path
        is a model folder, its folder ``subsets``, or a file ``results.csv``. For a claim about methods give a list of
        paths per name, one for each training.
    metrics:
        Metrics to compare by; the figure shows the first.
    baseline:
        Name of the model that all others are compared with; default: all pairs are compared.
    output:
        Folder for comparison.md, .json and .png, made if absent; default: nothing is written.

    Returns
    -------
    A comparison with ``text`` and the data frames ``overall``, ``by_count``, ``by_subset``, ``per_case`` and ``ranks``.

    Raises
    ------
    InputError, MissingFileError
        If a model was not evaluated, or the models were not measured in the same way.
    """
    output = None if output is None else Path(output)
    if output is not None and output.exists() and not output.is_dir():
        raise ExistingFileError(f"the output folder {output} is a file")
    comparison = ModelComparison(read_evaluations(models), metrics=tuple(dict.fromkeys(metrics)), baseline=baseline)
    if output is not None:
        _write(comparison, output)
    return comparison


def _write(comparison: Comparison, output: Path) -> None:
    """Write all files of a comparison, each of them atomically."""
    # here, because it imports matplotlib
    from nnunetv2_mstkd.reporting.figures import differences_plot, save_figure

    metric = comparison.metrics[0]
    tables = [_part(table, metric) for table in (comparison.overall, comparison.by_count, comparison.by_subset)]
    save_figure(differences_plot(*tables, metric=metric), output / FIGURE)
    write_json(output / NUMBERS, _numbers(comparison))
    write_text(output / PAGE, _page(comparison))


def _part(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric."""
    return table[table[METRIC] == metric].drop(columns=METRIC)


# ---- numbers -------------------------------------------------------------------------------------------------------


def _numbers(comparison: Comparison) -> dict[str, Any]:
    drawn = comparison.bootstrap
    tables = {
        "overall": comparison.overall,
        "by_number_of_modalities": comparison.by_count,
        "subsets": comparison.by_subset,
        "per_case": comparison.per_case,
    }
    return {
        "package_version": nnunetv2_mstkd.__version__,
        "models": comparison.about(),
        "cases": comparison.cases,
        "patients": comparison.num_patients,
        "subsets": list(comparison.subsets),
        "cases_by_subset": comparison.counts,
        "bootstrap": {"unit": "patient", "samples": drawn.samples, "seed": drawn.seed, "level": drawn.level},
        "trainings": comparison.trainings,
        "test": None
        if comparison.several_trainings
        else "two-sided Wilcoxon signed-rank test on the patients' mean differences; Holm's correction",
        "notes": comparison.notes,
        "metrics": {
            metric: {
                "better": {1: "higher", -1: "lower", 0: "closer to zero"}[metric_named(metric).better],
                **{key: _records(_part(table, metric)) for key, table in tables.items()},
            }
            for metric in comparison.metrics
        },
        "ranks": None if comparison.ranks is None else _records(comparison.ranks),
    }


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows for JSON, which has no NaN."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    for row in rows:
        if row.get(BY_TRAINING) is not None:
            row[BY_TRAINING] = [None if math.isnan(value) else value for value in row[BY_TRAINING]]
    return rows


# ---- text ----------------------------------------------------------------------------------------------------------


def _page(comparison: Comparison) -> str:
    names = " against ".join(escaped(name, MARKDOWN) for name in comparison.trainings)
    tested = not comparison.several_trainings
    lines = [f"# {names}", "", _compared(comparison), "", _models(comparison), "", *_bullets(comparison.notes)]
    for name in comparison.metrics:
        metric = metric_named(name)
        lines += [f"## {metric.label}", "", _direction(metric), ""]
        lines += ["### Mean over all subsets", "", _overall(comparison, name, MARKDOWN), ""]
        for title, table, column in (
            ("By number of modalities", comparison.by_count, MODALITIES),
            ("By subset", comparison.by_subset, SUBSET),
        ):
            counts = comparison.counts if column == SUBSET and comparison.uneven else {}
            lines += [
                f"### {title}",
                "",
                _differences(_part(table, name), column, metric, MARKDOWN, tested, counts),
                "",
            ]
    if comparison.ranks is not None:
        lines += ["## Ranks", "", _ranks(comparison.ranks, MARKDOWN), "", _about_ranks(comparison), ""]
    label = metric_named(comparison.metrics[0]).label
    lines += [f"![Differences of {label} with intervals]({FIGURE})", "", *_method(comparison)]
    return "\n".join(lines) + "\n"


def _text(comparison: Comparison) -> str:
    """The short version, as printed."""
    parts = [_compared(comparison)]
    for name in comparison.metrics:
        metric, counts = metric_named(name), _part(comparison.by_count, name)
        region = counts[REGION].iloc[-1]
        parts.append(f"{metric.label}: {_direction(metric)}\n\n{_overall(comparison, name, TEXT)}")
        tested = not comparison.several_trainings
        table = _differences(counts[counts[REGION] == region], MODALITIES, metric, TEXT, tested)
        parts.append(f"by number of modalities, {region}\n\n{table}")
    if comparison.ranks is not None:
        parts.append(f"{_ranks(comparison.ranks, TEXT)}\n\n{_about_ranks(comparison)}")
    parts += [f"note: {note}" for note in comparison.notes]
    return "\n\n".join(parts)


def _compared(comparison: Comparison) -> str:
    counts = {"case": len(comparison.cases), "patient": comparison.num_patients, "subset": len(comparison.subsets)}
    cases, patients, subsets = (f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items())
    return f"Compared on {cases} of {patients}, {subsets} of modalities."


def _models(comparison: Comparison) -> str:
    rows = [
        (model.label, each["trainer"], " ".join(each["folds"]), each["cases"], len(each["not_compared"]))
        for model, each in zip(comparison.models, comparison.about(), strict=True)
    ]
    return frame_table(pd.DataFrame(rows, columns=["model", "trainer", "folds", "cases", "of these not compared"]))


def _direction(metric: Metric) -> str:
    unit = "points" if metric.unit == "%" else metric.unit
    better = {1: "a positive one is a gain", -1: "a negative one is a gain", 0: "of sizes; a negative one is a gain"}
    return f"differences (model - against) in {unit}; {better[metric.better]}"


def _overall(comparison: Comparison, name: str, fmt: str) -> str:
    metric, columns = metric_named(name), [MODEL, AGAINST, REGION, "difference [interval]"]
    columns += ["by training"] if comparison.several_trainings else [P, P_HOLM]
    rows = []
    for row in _part(comparison.overall, name).to_dict("records"):
        last = (_by_training(row, metric),) if comparison.several_trainings else (row[P], row[P_CORRECTED])
        rows.append((row[MODEL], row[AGAINST], row[REGION], _estimate(row, metric), *last))
    return frame_table(pd.DataFrame(rows, columns=columns), fmt=fmt)


def _differences(
    table: pd.DataFrame,
    column: str,
    metric: Metric,
    fmt: str,
    tested: bool,
    counts: Mapping[str, int] | None = None,
) -> str:
    """A row per pair and value of ``column``, and a column per region, or two with the corrected p-value.

    Numbers of cases by value of ``column`` get a column too.
    """
    regions = list(dict.fromkeys(table[REGION]))
    several = len(table[[MODEL, AGAINST]].drop_duplicates()) > 1
    rows = []
    for (model, against, key), group in table.groupby([MODEL, AGAINST, column], sort=False):
        by_region = {row[REGION]: row for row in group.to_dict("records")}
        cells = []
        for row in (by_region[region] for region in regions):
            cells += [_estimate(row, metric), *([row[P_CORRECTED]] if tested else [])]
        pair = (model, against) if several else ()
        count = (counts[key],) if counts else ()
        rows.append((*pair, str(key), *count, *cells))
    heads = (head for region in regions for head in (region, *([P_HOLM] if tested else [])))
    columns = [*((MODEL, AGAINST) if several else ()), column, *(("n",) if counts else ()), *heads]
    return frame_table(pd.DataFrame(rows, columns=columns), fmt=fmt)


def _estimate(row: dict[Any, Any], metric: Metric) -> str:
    return estimate(row, DIFFERENCE, factor=metric.factor, digits=2, sign="+")


def _by_training(row: dict[Any, Any], metric: Metric) -> str:
    values = row.get(BY_TRAINING)
    if values is None:
        return "not paired"
    return ", ".join(number(value * metric.factor, 2, "+") for value in values)


def _ranks(ranks: pd.DataFrame, fmt: str) -> str:
    rows = [
        (
            row["rank"],
            row[MODEL],
            f"{row['mean_rank']:.2f}",
            NO_VALUE if math.isnan(row[LOW]) else f"{row[LOW]:.0f} to {row[HIGH]:.0f}",
            f"{100 * row['first']:.0f} %",
        )
        for row in ranks.to_dict("records")
    ]
    columns = ["rank", MODEL, "mean rank", "interval of the rank", "first in resamples"]
    return frame_table(pd.DataFrame(rows, columns=columns), fmt=fmt)


def _about_ranks(comparison: Comparison) -> str:
    labels = ", ".join(metric_named(name).label for name in comparison.metrics)
    several = comparison.several_trainings
    drawn = "patients and trainings (few of these make it look more stable than it is)" if several else "patients"
    return f"Ranked within each case, subset and region by {labels}; the ranking is repeated on resampled {drawn}."


def _method(comparison: Comparison) -> list[str]:
    bootstrap = comparison.bootstrap
    intervals = (
        f"Intervals: {100 * bootstrap.level:g} %, {bootstrap.samples} resamples of patients (seed {bootstrap.seed}), "
        f"each of which brings all its cases"
    )
    about = (
        [f"{intervals}, and in quadrature the t interval over the trainings."]
        if comparison.several_trainings
        else [
            f"{intervals}. Where subsets or numbers of modalities are tested together, the level of an interval is "
            f"that of Holm's procedure at its p-value.",
            "p: two-sided Wilcoxon signed-rank test on the mean differences of patients. p (Holm): corrected within "
            "its table, over all its rows and regions; in tables by subset or number within each pair of models.",
        ]
    )
    return _bullets(
        [
            *about,
            "Research use. The numbers describe these cases; they say nothing about other scanners, sites or patients, "
            "and nothing about clinical benefit.",
        ]
    )


def _bullets(sentences: list[str]) -> list[str]:
    return [*(f"* {escaped(sentence, MARKDOWN)}" for sentence in sentences), *([""] if sentences else [])]
