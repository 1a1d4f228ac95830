"""Compare evaluated models case by case: pages in HTML and Markdown, tables, figures, JSON, and the text to print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import nnunetv2_mstkd
from nnunetv2_mstkd.errors import ExistingFileError
from nnunetv2_mstkd.evaluation.results import METRIC, MODALITIES, MODEL, NOTED, REGION, SUBSET, VALUE
from nnunetv2_mstkd.images.atomic import write_json, write_text
from nnunetv2_mstkd.inference.evaluation_files import COMPARISON
from nnunetv2_mstkd.metrics.conventions import Metric, metric_named
from nnunetv2_mstkd.reporting.html import render
from nnunetv2_mstkd.reporting.tables import (
    LATEX,
    MARKDOWN,
    NO_VALUE,
    P_HOLM,
    TEXT,
    SubsetContent,
    about_data,
    escaped,
    estimate,
    frame_cells,
    frame_table,
    number,
    p_text,
    subset_content,
    subset_csv,
    subset_rows,
    subset_table,
)
from nnunetv2_mstkd.statistics.bootstrap import HIGH, LOW
from nnunetv2_mstkd.statistics.comparison import HOURS, PARAMETERS, Comparison, Models, read_evaluations
from nnunetv2_mstkd.statistics.significance import AGAINST, BY_TRAINING, DIFFERENCE, P_CORRECTED, PATIENTS, P

PAGE = "comparison.md"
NUMBERS = "comparison.json"
FIGURE = "comparison.png"
COST = "cost.png"
QUALITATIVE = "qualitative.png"
TABLES = {MARKDOWN: "tables.md", LATEX: "tables.tex"}
CSV = "tables.csv"

MOST_PAIRS = 5
"""A comparison of more pairs opens with the means alone; the differences are in its tables."""


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
    hours: Mapping[str, float] | None = None,
    show_cases: Sequence[str] = (),
    show_subsets: Sequence[str] = (),
    output: Path | str | None = None,
) -> ModelComparison:
    """Compare two or more evaluated models case by case, over all subsets of modalities.

    Parameters
    ----------
    models:
        Path of each model by name, ``{"ours": path, ...}``, or a list of paths, whose models keep the names in their
        results. A path is a model folder, its folder ``subsets``, or a file ``results.csv``. For a claim about
        methods give a list of paths per name, one for each training.
    metrics:
        Metrics to compare by; the figure shows the first.
    baseline:
        Name of the model that all others are compared with; default: all pairs are compared.
    hours:
        Training hours by model name, such as those of teacher and student together; default: the hours that the
        evaluations recorded.
    show_cases, show_subsets:
        Cases and subsets in the figure with pictures; default: the median case, and the worst subset of each size.
    output:
        Folder for comparison.html and all other files, created if necessary; default: nothing is written.

    Returns
    -------
    A comparison with ``text`` and the data frames ``overall``, ``by_count``, ``by_subset``, ``per_case``, ``ranks``
    and ``costs``; ``results`` are the compared values.

    Raises
    ------
    InputError, MissingFileError
        If a model has not been evaluated, or the models were not evaluated in the same way.
    """
    output = None if output is None else Path(output)
    if output is not None and output.exists() and not output.is_dir():
        raise ExistingFileError(f"the output folder {output} is a file")
    comparison = ModelComparison(
        read_evaluations(models), metrics=tuple(dict.fromkeys(metrics)), baseline=baseline, hours=hours
    )
    if output is not None:
        _write(comparison, output, show_cases, show_subsets)
    return comparison


def _write(comparison: Comparison, output: Path, cases: Sequence[str], subsets: Sequence[str]) -> None:
    """Write all files of a comparison, each of them atomically."""
    # here, because it imports matplotlib
    from nnunetv2_mstkd.reporting.figures import cost_plot, differences_plot, save_figure
    from nnunetv2_mstkd.reporting.qualitative import qualitative_plot

    drawn = {QUALITATIVE: qualitative_plot(comparison, cases, subsets)}
    metric = comparison.metrics[0]
    tables = [_part(table, metric) for table in (comparison.overall, comparison.by_count, comparison.by_subset)]
    drawn |= {FIGURE: differences_plot(*tables, metric=metric), COST: cost_plot(comparison.costs, metric=metric)}
    for name, figure in drawn.items():
        if figure is None:
            (output / name).unlink(missing_ok=True)  # of an earlier comparison
        else:
            save_figure(figure, output / name, dpi=200 if name == QUALITATIVE else 150)
    for fmt, name in TABLES.items():
        mark = "##" if fmt == MARKDOWN else "%"
        parts = [
            f"{mark} {metric_named(each).label}\n\n{_subsets(comparison, each, fmt)}\n" for each in comparison.metrics
        ]
        write_text(output / name, "\n".join(parts))
    write_text(output / CSV, subset_csv({each: _content(comparison, each) for each in comparison.metrics}))
    write_json(output / NUMBERS, _numbers(comparison))
    write_text(output / PAGE, _page(comparison, drawn[QUALITATIVE] is not None))
    write_text(output / COMPARISON, _html(comparison, output))


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
        "costs": _records(comparison.costs),
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


def _page(comparison: Comparison, pictured: bool) -> str:
    lines = [f"# {escaped(_title(comparison), MARKDOWN)}", "", _compared(comparison), ""]
    lines += _bullets(_headlines(comparison))
    lines += [frame_table(_models(comparison), fmt=MARKDOWN), "", *_bullets(comparison.notes)]
    for name in comparison.metrics:
        metric = metric_named(name)
        lines += [f"## {metric.label}", "", "### All models and subsets", "", _subsets(comparison, name, MARKDOWN), ""]
        lines += ["### Differences", "", _direction(metric), ""]
        for title, table in _difference_tables(comparison, name):
            lines += [f"#### {title}", "", frame_table(table, fmt=MARKDOWN), ""]
    if _costs_known(comparison):
        lines += [
            "## Cost",
            "",
            frame_table(_costs(comparison), fmt=MARKDOWN),
            "",
            f"![Performance and cost]({COST})",
            "",
        ]
    if (ranks := _ranks(comparison)) is not None:
        lines += ["## Ranks", "", frame_table(ranks, fmt=MARKDOWN), "", _about_ranks(comparison), ""]
    label = metric_named(comparison.metrics[0]).label
    if pictured:
        lines += ["## Pictures", "", f"![Segmentations of all models]({QUALITATIVE})", ""]
    lines += [f"![Differences of {label} with intervals]({FIGURE})", "", *_bullets(_method(comparison))]
    return "\n".join(lines) + "\n"


def _html(comparison: Comparison, output: Path) -> str:
    """The page with all tables and the figures of a folder."""
    # here, because it imports seaborn
    from nnunetv2_mstkd.reporting.pictures import file_uri

    contents = {name: _content(comparison, name) for name in comparison.metrics}
    return render(
        "comparison.html",
        title=_title(comparison),
        compared=_compared(comparison),
        headlines=_headlines(comparison),
        notes=comparison.notes,
        files=[*TABLES.values(), CSV],
        second=any(content.second.any() for content in contents.values()),
        metrics=[
            {
                "label": metric_named(name).label,
                "content": content,
                "direction": _direction(metric_named(name)),
                "tables": [(title, frame_cells(table)) for title, table in _difference_tables(comparison, name)],
            }
            for name, content in contents.items()
        ],
        plot=file_uri(output / FIGURE),
        cost=file_uri(output / COST) if _costs_known(comparison) else None,
        qualitative=file_uri(output / QUALITATIVE) if (output / QUALITATIVE).is_file() else None,
        costs=frame_cells(_costs(comparison)),
        ranks=None if (ranks := _ranks(comparison)) is None else frame_cells(ranks),
        about_ranks=_about_ranks(comparison),
        models=frame_cells(_models(comparison)),
        method=_method(comparison),
    )


def models_by_subset(comparison: Comparison, metric: str) -> str:
    """As text, a metric of every model with every subset, and the rules for empty masks."""
    content = _content(comparison, metric)
    return "\n\n".join([content.notes[0], frame_table(subset_rows(content, metric), fmt=TEXT), *content.notes[1:]])


def _text(comparison: Comparison) -> str:
    """The short version, as printed."""
    parts = [_compared(comparison), "\n".join(_headlines(comparison))]
    for name in comparison.metrics:
        metric, counts = metric_named(name), _part(comparison.by_count, name)
        region = counts[REGION].iloc[-1]
        parts.append(models_by_subset(comparison, name))
        parts.append(f"{metric.label}: {_direction(metric)}\n\n{frame_table(_overall(comparison, name), fmt=TEXT)}")
        tested = not comparison.several_trainings
        table = _differences(counts[counts[REGION] == region], MODALITIES, metric, tested)
        parts.append(f"by number of modalities, {region}\n\n{frame_table(table, fmt=TEXT)}")
    if _costs_known(comparison):
        parts.append(f"cost\n\n{frame_table(_costs(comparison), fmt=TEXT)}")
    if (ranks := _ranks(comparison)) is not None:
        parts.append(f"{frame_table(ranks, fmt=TEXT)}\n\n{_about_ranks(comparison)}")
    parts += [f"note: {note}" for note in comparison.notes]
    return "\n\n".join(parts)


def _title(comparison: Comparison) -> str:
    names = list(comparison.trainings)
    return (" against " if len(names) == 2 else ", ").join(names)


def _content(comparison: Comparison, metric: str) -> SubsetContent:
    return subset_content(comparison.results, metric=metric, **_rules(comparison))


def _subsets(comparison: Comparison, metric: str, fmt: str) -> str:
    return subset_table(comparison.results, metric=metric, fmt=fmt, **_rules(comparison))


def _rules(comparison: Comparison) -> dict[str, Any]:
    return {key: comparison.rule(key) for key in NOTED}


def _difference_tables(comparison: Comparison, name: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and table of all differences of a metric."""
    metric, tested = metric_named(name), not comparison.several_trainings
    yield "Mean over all subsets", _overall(comparison, name)
    yield "By number of modalities", _differences(_part(comparison.by_count, name), MODALITIES, metric, tested)
    counts = comparison.counts if comparison.uneven else {}
    yield "By subset", _differences(_part(comparison.by_subset, name), SUBSET, metric, tested, counts)


def _costs_known(comparison: Comparison) -> bool:
    return bool(comparison.costs[[PARAMETERS, HOURS]].notna().any(axis=None))


def _costs(comparison: Comparison) -> pd.DataFrame:
    """What each model costs, and its mean value; means over its trainings."""
    metric = metric_named(comparison.metrics[0])
    table = comparison.costs.groupby(MODEL, sort=False)[[VALUE, PARAMETERS, HOURS]].mean()
    rows = [
        (name, number(value * metric.factor), number(parameters / 1e6, 2), number(hours, 2))
        for name, value, parameters, hours in table.itertuples()
    ]
    columns = [MODEL, f"{metric.label} ({metric.unit})", "parameters (millions)", "hours of training"]
    return pd.DataFrame(rows, columns=columns)


def _compared(comparison: Comparison) -> str:
    counts = {"case": len(comparison.cases), "patient": comparison.num_patients, "subset": len(comparison.subsets)}
    cases, patients, subsets = (f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items())
    data = about_data(comparison.rule("dataset"), comparison.rule("description"))
    return f"Compared on {cases} of {patients}, {subsets} of modalities.{data}"


def _headlines(comparison: Comparison) -> list[str]:
    """The result in sentences: each model's mean by the first metric, and what pairs with a baseline differ by."""
    metric = metric_named(comparison.metrics[0])
    unit = "points" if metric.unit == "%" else metric.unit
    means = comparison.costs.groupby(MODEL, sort=False)[VALUE].mean() * metric.factor
    listed = ", ".join(f"{name} {number(value)}" for name, value in means.items())
    sentences = [f"{metric.label} in {metric.unit}, mean over all subsets and regions: {listed}"]
    overall = _part(comparison.overall, comparison.metrics[0])
    differ = comparison.uneven or comparison.partly_left_out[comparison.metrics[0]]
    how = " (mean of the patients' own differences)" if differ else ""
    for row in overall.drop_duplicates([MODEL, AGAINST], keep="last").to_dict("records"):  # last: over all regions
        p = "" if comparison.several_trainings else f"; p (Holm) {p_text(row[P_CORRECTED])}"
        sentences.append(f"{row[MODEL]} against {row[AGAINST]}: {_estimate(row, metric)} {unit}{how}{p}")
    return sentences if len(sentences) <= MOST_PAIRS + 1 else sentences[:1]


def _models(comparison: Comparison) -> pd.DataFrame:
    rows = [
        (model.label, each["trainer"], " ".join(each["folds"]), each["cases"], len(each["not_compared"]))
        for model, each in zip(comparison.models, comparison.about(), strict=True)
    ]
    return pd.DataFrame(rows, columns=["model", "trainer", "folds", "cases", "of these not compared"])


def _direction(metric: Metric) -> str:
    unit = "points" if metric.unit == "%" else metric.unit
    better = {1: "a positive one is a gain", -1: "a negative one is a gain", 0: "of sizes; a negative one is a gain"}
    return f"differences (model - against) in {unit}; {better[metric.better]}"


def _overall(comparison: Comparison, name: str) -> pd.DataFrame:
    metric, columns = metric_named(name), [MODEL, AGAINST, REGION, "difference [interval]"]
    columns += ["by training"] if comparison.several_trainings else [P, P_HOLM]
    part = _part(comparison.overall, name)
    rows = []
    for row in part.to_dict("records"):
        last = (_by_training(row, metric),) if comparison.several_trainings else (row[P], row[P_CORRECTED])
        rows.append((row[MODEL], row[AGAINST], row[REGION], _estimate(row, metric), *last))
    table = pd.DataFrame(rows, columns=columns)
    if part[PATIENTS].nunique() > 1:  # a region that many references lack
        table.insert(3, PATIENTS, part[PATIENTS].to_list())
    return table


def _differences(
    table: pd.DataFrame,
    column: str,
    metric: Metric,
    tested: bool,
    counts: Mapping[str, int] | None = None,
) -> pd.DataFrame:
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
    return pd.DataFrame(rows, columns=columns)


def _estimate(row: dict[Any, Any], metric: Metric) -> str:
    return estimate(row, DIFFERENCE, factor=metric.factor, digits=2, sign="+")


def _by_training(row: dict[Any, Any], metric: Metric) -> str:
    values = row.get(BY_TRAINING)
    if values is None:
        return "not paired"
    return ", ".join(number(value * metric.factor, 2, "+") for value in values)


def _ranks(comparison: Comparison) -> pd.DataFrame | None:
    """The ranks to show: of two models they say less than the difference, and a first place looks like certainty."""
    if comparison.ranks is None or len(comparison.trainings) < 3:
        return None
    rows = [
        (
            row["rank"],
            row[MODEL],
            f"{row['mean_rank']:.2f}",
            NO_VALUE if math.isnan(row[LOW]) else f"{row[LOW]:.0f} to {row[HIGH]:.0f}",
            f"{100 * row['first']:.0f} %",
        )
        for row in comparison.ranks.to_dict("records")
    ]
    columns = ["rank", MODEL, "mean rank", "interval of the rank", "resamples in first place"]
    return pd.DataFrame(rows, columns=columns)


def _about_ranks(comparison: Comparison) -> str:
    labels = ", ".join(metric_named(name).label for name in comparison.metrics)
    several = comparison.several_trainings
    drawn = "patients and training runs (few of these make it look more stable than it is)" if several else "patients"
    return (
        f"Ranked within each case, subset and region by {labels}; the ranking is repeated on resampled {drawn}. "
        "A first place says nothing about the size of the difference."
    )


def _method(comparison: Comparison) -> list[str]:
    bootstrap = comparison.bootstrap
    intervals = (
        f"Intervals: {100 * bootstrap.level:g} %, {bootstrap.samples} resamples of patients (seed {bootstrap.seed}), "
        f"each of which brings all its cases"
    )
    about = (
        [f"{intervals}, and in quadrature the t interval over the training runs."]
        if comparison.several_trainings
        else [
            f"{intervals}. Where subsets or numbers of modalities are tested together, the level of an interval is "
            f"that of Holm's procedure at its p-value.",
            "p: two-sided Wilcoxon signed-rank test on the mean differences of patients. p (Holm): corrected within "
            "its table, over all its rows and regions; in tables by subset or number within each pair of models.",
        ]
    )
    return [
        *about,
        "Research use. The numbers describe these cases; they say nothing about other scanners, sites or patients, "
        "and nothing about clinical benefit.",
    ]


def _bullets(sentences: list[str]) -> list[str]:
    return [*(f"* {escaped(sentence, MARKDOWN)}" for sentence in sentences), *([""] if sentences else [])]
