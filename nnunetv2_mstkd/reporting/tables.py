"""Tables as plain text, Markdown and LaTeX.

:func:`subset_table` has the layout of the missing-modality literature: a column per subset under rows of dots that show
which modalities are available, then a row per region and model, and the average as last column. The rules for empty
masks stand below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nnunetv2_mstkd.evaluation.results import (
    IN_REFERENCE,
    METRIC,
    MODALITIES,
    MODEL,
    REGION,
    SCORE,
    SEPARATOR,
    SUBSET,
    VALUE,
    subset_size,
)
from nnunetv2_mstkd.metrics.conventions import BRATS, NSD, Metric, empty_rules_text, metric_named, min_voxels_text
from nnunetv2_mstkd.statistics.bootstrap import HIGH, LOW, Cube, cube, mean, plain_regions, unsigned
from nnunetv2_mstkd.statistics.calibration import Calibration
from nnunetv2_mstkd.statistics.findings import Findings
from nnunetv2_mstkd.statistics.shapley import MODALITY
from nnunetv2_mstkd.statistics.significance import P_CORRECTED, P

TEXT = "text"
"""The layout of Markdown, but nothing is escaped."""
MARKDOWN = "markdown"
LATEX = "latex"

AVAILABLE = "\u25cf"
MISSING = "\u25cb"
NO_VALUE = "-"

P_HOLM = "p (Holm)"
P_VALUES = (P, P_CORRECTED, P_HOLM)
"""Columns of p-values, printed as ``<0.001`` where they are smaller."""

_LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}"}
)


def subset_table(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    fmt: str = MARKDOWN,
    convention: str | None = BRATS,
    lesion_convention: str | None = None,
    tolerance: float | None = None,
) -> str:
    """A metric of all models with every subset of modalities.

    Parameters
    ----------
    results:
        The long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`. With several models the best of each
        column is bold, and of three or more the second best is in italics, in LaTeX underlined.
    metric:
        Name of the metric; fractions are printed in percent.
    fmt:
        ``"text"``, ``"markdown"``, or ``"latex"``, which needs the package booktabs.
    convention, lesion_convention:
        The rules that the values were computed with, for the text below; None: not known, so none are named.
    tolerance:
        That of the normalised surface Dice in mm, for the same text.

    Returns
    -------
    The table and the text below it, with the number of cases and, if there are any, of values that were left out. Where
    cases lack subsets, a row ``n`` has the number of cases of each subset.

    Raises
    ------
    InputError
        For an unknown metric or convention, and for incomplete results.
    """
    content = subset_content(
        results, metric=metric, convention=convention, lesion_convention=lesion_convention, tolerance=tolerance
    )
    data, several = content.data, len(content.data.models) > 1
    marks = ((r"\textbf{", "}"), (r"\underline{", "}")) if fmt == LATEX else (("**", "**"), ("_", "_"))
    texts = content.texts
    for (before, after), marked in zip(marks, (content.best, content.second), strict=True):
        texts = np.where(marked, before + content.texts + after, texts)
    dots = (r"$\bullet$", r"$\circ$") if fmt == LATEX else (AVAILABLE, MISSING)
    head = [
        [escaped(name, fmt), *([""] if several else []), *(dots[0] if there else dots[1] for there in row), ""]
        for name, row in zip(data.modalities, content.available, strict=True)
    ]
    head[0][-1] = "Avg." if fmt == LATEX else "average"
    if not data.complete:
        head.append(["n", *([""] if several else []), *map(str, data.counts), ""])
    body = []
    for r, region in enumerate(data.regions):
        for m, model in enumerate(data.models):
            name = escaped(region, fmt) if m == 0 or fmt != LATEX else ""
            body.append([name, *([escaped(model, fmt)] if several else []), *texts[m, :, r]])
    lines = _layout(head, body, fmt, len(data.models) if several else 0, named=2 if several else 1)
    legend = [f"bold: best; {'underlined' if fmt == LATEX else 'italics'}: second best"] if content.second.any() else []
    return "\n".join(lines) + "\n\n" + _below([content.notes[0], *legend, *content.notes[1:]], fmt)


def subset_csv(contents: Mapping[str, SubsetContent]) -> str:
    """Tables of subsets by metric as comma-separated values: a row per metric, region and model."""
    frames = []
    for metric, content in contents.items():
        data = content.data
        texts = content.texts.transpose(2, 0, 1).reshape(-1, len(data.subsets) + 1)  # (regions x models, subsets)
        frame = pd.DataFrame(np.where(texts == NO_VALUE, "", texts), columns=[*data.subsets, "average"])
        keys = pd.MultiIndex.from_product([data.regions, data.models], names=[REGION, MODEL]).to_frame(index=False)
        frames.append(pd.concat([keys, frame], axis=1).assign(metric=metric).set_index(METRIC))
    return pd.concat(frames).to_csv(lineterminator="\n")


class SubsetContent(NamedTuple):
    """The content of a table of subsets, before any layout.

    ``texts`` are ``means`` as text, ``best`` and ``second`` whether a model is the best of several and the second best
    of three or more, all of shape (models, subsets and their average, regions); ``notes`` are sentences for below the
    table, including the rules for empty masks.
    """

    data: Cube
    available: np.ndarray
    """bool, shape (modalities, subsets)."""
    means: np.ndarray
    """float, in the unit of the metric."""
    texts: np.ndarray
    best: np.ndarray
    second: np.ndarray
    notes: list[str]


def subset_content(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    convention: str | None = BRATS,
    lesion_convention: str | None = None,
    tolerance: float | None = None,
) -> SubsetContent:
    """The content of :func:`subset_table`, which explains the parameters."""
    kind = metric_named(metric)
    notes = []
    if convention is not None:
        notes = empty_rules_text(convention, [metric], lesion_convention=lesion_convention).splitlines()
    data = cube(results, metric)
    # (models, subsets and their average, regions)
    means = mean(data.values, axis=1) * kind.factor
    means = np.concatenate([means, mean(means, axis=1)[:, None]], axis=1)
    sizes = mean(np.stack([mean(unsigned(each, metric), axis=0) for each in data.trainings]), axis=1) * kind.factor
    texts, best, second = _texts(means, kind, np.concatenate([sizes, mean(sizes, axis=1)[:, None]], axis=1))
    cases = f"{len(data.cases)} case{'s' if len(data.cases) != 1 else ''}"
    if not data.complete:
        cases = f"n of {cases}, those with these modalities"
    within = f" at a tolerance of {tolerance:g} mm" if metric == NSD and tolerance is not None else ""
    about = f"{kind.label} in {kind.unit}{within}, mean of {cases}"
    if kind.better == 0 and len(data.models) > 1:
        about += ", with their signs; the best are those with the smallest mean size"
    evaluated = data.values[:, data.evaluated]
    left_out = int(np.isnan(evaluated).sum())
    if left_out:
        about += f"; {left_out} of {evaluated.size} values left out"
    patients = "" if data.complete else ", which are of different patients"
    subsets = f"{len(data.subsets)} subset{'s' * (len(data.subsets) != 1)}"
    notes = [f"{about}; average over {subsets}{patients}", *notes, *min_voxels_text(data.regions)]
    members = [subset.split(SEPARATOR) for subset in data.subsets]
    available = np.array([[name in subset for subset in members] for name in data.modalities])
    return SubsetContent(data, available, means, texts, best, second, notes)


def subset_rows(content: SubsetContent, metric: str) -> pd.DataFrame:
    """A table for a narrow page, as text: a row per subset, a column per model with its mean over the regions.

    The rows below have the average over subsets, of all regions and of each.
    """
    data, average = content.data, content.means.shape[1] - 1
    over_regions = mean(content.means[..., plain_regions(data.regions)], axis=2)
    means = np.concatenate([over_regions, content.means[:, average]], axis=1)
    texts = _texts(means, metric_named(metric), means)[0]
    rows = [[AVAILABLE if there else MISSING for there in row] for row in content.available.T]
    below = ["average", *data.regions] if len(data.regions) > 1 else ["average"]
    rows += [[name] + [""] * (len(data.modalities) - 1) for name in below]
    if not data.complete:
        rows = [[*row, str(n)] for row, n in zip(rows, [*data.counts, *[""] * len(below)], strict=True)]
    columns = [*data.modalities, *([] if data.complete else ["n"]), *data.models]
    return pd.DataFrame([[*row, *texts[:, i]] for i, row in enumerate(rows)], columns=columns)


def frame_table(table: pd.DataFrame, *, fmt: str = MARKDOWN, digits: int = 3) -> str:
    """Any table, whose column names may repeat; floats are rounded to ``digits``."""
    head, body = frame_cells(table, fmt=fmt, digits=digits)
    return "\n".join(_layout([head], body, fmt, 0, named=1))


def frame_cells(table: pd.DataFrame, *, fmt: str = TEXT, digits: int = 3) -> tuple[list[str], list[list[str]]]:
    """The column names and the rows of :func:`frame_table` as text."""

    def text(value: object, column: str) -> str:
        if isinstance(value, float | np.floating):
            if np.isnan(value):
                return NO_VALUE
            return p_text(float(value), fmt, digits) if column in P_VALUES else f"{value:.{digits}f}"
        return escaped(str(value), fmt)

    head = [escaped(str(name), fmt) for name in table.columns]
    return head, [
        [text(value, str(name)) for name, value in zip(table.columns, row, strict=True)]
        for row in table.itertuples(index=False)
    ]


def p_text(value: float, fmt: str = TEXT, digits: int = 3) -> str:
    """A p-value, ``<0.001`` where it is smaller; NaN is a dash."""
    if value < 10**-digits:
        return f"{'$<$' if fmt == LATEX else '<'}{10**-digits:.{digits}f}"
    return number(value, digits)


# ---- the findings of one model -------------------------------------------------------------------------------------


class FindingTable(NamedTuple):
    """A table of an evaluation as text."""

    title: str
    table: pd.DataFrame
    patients: int
    """Number of patients behind it."""


def finding_tables(findings: Findings) -> Iterator[FindingTable]:
    """The tables of an evaluation."""
    everyone, full, some = findings.num_patients, findings.full_patients, ""
    if not findings.complete:
        some = f", from {len(findings.full_cases)} of {len(findings.cases)} cases, which have all modalities"
    overall = overall_table(findings.summary, {} if findings.complete else findings.counts)
    yield FindingTable("Dice over all evaluated subsets, and the worst one", overall, everyone)
    if findings.by_count[MODALITIES].nunique() > 1:
        yield FindingTable("Dice by number of modalities", spread_table(findings.by_count, MODALITIES), everyone)
    if findings.gap is not None:
        gap = findings.gap
        change = gap.assign(**{VALUE: -gap[VALUE], LOW: -gap[HIGH], HIGH: -gap[LOW]})
        title = f"Change of Dice against complete input, in points{some}"
        yield FindingTable(title, spread_table(change, SUBSET, sign="+"), full)
    if findings.shapley is not None:
        title = f"Contribution of each modality: exact Shapley values, points of Dice{some}"
        yield FindingTable(title, spread_table(findings.shapley, MODALITY), full)


def presence_table(presence: pd.DataFrame, subsets: Sequence[str]) -> pd.DataFrame:
    """Mean stated presence of each subset and region, as text: where the reference has the region / where it has not.

    ``presence`` has the columns :data:`~nnunetv2_mstkd.evaluation.results.PRESENCE_COLUMNS`.
    """
    keys = [SUBSET, REGION, IN_REFERENCE]
    found = presence.groupby(keys)[SCORE].agg(["mean", "size"]).to_dict("index")

    def text(*key: Hashable) -> str:
        return f"{found[key]['mean']:.2f} (n = {found[key]['size']})" if key in found else NO_VALUE

    regions = list(dict.fromkeys(presence[REGION]))
    stated = [subset for subset in subsets if subset in set(presence[SUBSET])]
    rows = [
        (subset, *(f"{text(subset, region, True)} / {text(subset, region, False)}" for region in regions))
        for subset in stated
    ]
    return pd.DataFrame(rows, columns=[SUBSET, *regions])


def calibration_table(found: Calibration) -> pd.DataFrame:
    """As text: for each subset and region, the calibration error in percent / that with the temperature beside it."""
    rows = []
    for subset, regions in found.counts.items():
        errors = [
            f"{points(found.error(subset, region))} / {points(found.error(subset, region, calibrated=True))}"
            for region in regions
        ]
        rows.append((subset, *errors, f"{found.temperatures[subset_size(subset)]:.2f}"))
    return pd.DataFrame(rows, columns=[SUBSET, *next(iter(found.counts.values())), "temperature"])


def overall_table(table: pd.DataFrame, counts: Mapping[str, int]) -> pd.DataFrame:
    """``Findings.summary`` as text: region, mean with its interval, worst subset with its number of cases if given."""
    numbers = {subset: f", n = {number}" for subset, number in counts.items()}
    rows = [
        (
            row[REGION],
            estimate(row),
            f"{row['worst_subset']} ({points(row['worst'])}{numbers.get(row['worst_subset'], '')})",
        )
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=["region", "mean", "worst subset"])


def spread_table(table: pd.DataFrame, column: str, sign: str = "") -> pd.DataFrame:
    """A row per value of ``column`` and a column per region, in percent with the interval, as text."""
    regions = list(dict.fromkeys(table[REGION]))
    cells = {(row[column], row[REGION]): estimate(row, sign=sign) for row in table.to_dict("records")}
    rows = [(str(key), *(cells[key, region] for region in regions)) for key in dict.fromkeys(table[column])]
    return pd.DataFrame(rows, columns=[column, *regions])


def estimate(
    row: Mapping[Hashable, Any], column: str = VALUE, *, factor: float = 100, digits: int = 1, sign: str = ""
) -> str:
    """A value with its interval."""
    value, low, high = (number(row[name] * factor, digits, sign) for name in (column, LOW, HIGH))
    return value if low == NO_VALUE else f"{value} [{low}, {high}]"


def points(value: float) -> str:
    """A fraction times 100."""
    return number(100 * value)


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """A rounded number; with the sign ``"+"`` positive ones have one too."""
    return NO_VALUE if not math.isfinite(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0.0


def about_data(dataset: str | None, description: str | None) -> str:
    """A sentence on the data set, with dataset.json's description; empty where it is not known."""
    return f" Data set {dataset}{f' ({description})' if description else ''}." if dataset else ""


# ---- layout --------------------------------------------------------------------------------------------------------


def escaped(text: str, fmt: str) -> str:
    """Escape what has a meaning in the format; a name in a results file may be anything."""
    if fmt == TEXT:
        return text
    if fmt == LATEX:
        return text.translate(_LATEX_ESCAPES)
    # an underscore within a word has no meaning; a line break would end the row or the list
    return re.sub(r"([\\|*<&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text.replace("\n", " "))


def _texts(means: np.ndarray, metric: Metric, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values as text, where a model is the best of several, and the second best of more, in the shape of ``means``.

    ``sizes`` are means of the values without their signs, which decide where a metric has signs.
    """
    digits, better = 1 if metric.unit == "%" else 2, metric.better
    rounded = means.round(digits) + 0.0  # no -0.0
    texts = np.array([f"{value:.{digits}f}" for value in rounded.ravel()], dtype=object).reshape(means.shape)
    texts[np.isnan(means)] = NO_VALUE
    badness = np.where(np.isnan(rounded), np.inf, sizes.round(digits) if better == 0 else -better * rounded)
    # values that are printed alike share the best place
    best = (badness == badness.min(axis=0)) & np.isfinite(badness) & (len(means) > 1)
    others = np.where(best, np.inf, badness)
    second = (others == others.min(axis=0)) & np.isfinite(others) & (len(means) > 2) & (best.sum(axis=0) == 1)
    return texts, best, second


def _layout(head: list[list[str]], body: list[list[str]], fmt: str, group: int, *, named: int) -> list[str]:
    """Lines of a table: the rows of the head, a rule, the body; the first ``named`` columns are names."""
    columns = len(head[0])
    if fmt == LATEX:
        rows = [" & ".join(row) + r" \\" for row in body]
        if group:
            for position in range(group, len(body), group)[::-1]:
                rows.insert(position, r"\midrule")
        return [
            rf"\begin{{tabular}}{{{'l' * named}{'c' * (columns - named)}}}",
            r"\toprule",
            *(" & ".join(row) + r" \\" for row in head),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    widths = [max(3, *(len(row[column]) for row in (*head, *body))) for column in range(columns)]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if column < named else cell.center(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if column < named else f":{'-' * (width - 2)}:" for column, width in enumerate(widths)]
    # Markdown allows one row above the rule
    return [line(head[0]), line(rule), *map(line, head[1:]), *map(line, body)]


def _below(notes: list[str], fmt: str) -> str:
    if fmt != LATEX:
        return "\n".join(f"* {escaped(note, fmt)}" for note in notes)
    return "\n".join(
        [r"\par\footnotesize", *(rf"{escaped(note, fmt)}.\\" for note in notes[:-1]), f"{escaped(notes[-1], fmt)}."]
    )
