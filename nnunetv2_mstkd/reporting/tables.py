"""Tables in Markdown and LaTeX.

:func:`subset_table` has the layout of the missing-modality literature: a column per subset, with a row of dots per
modality on top that shows which are available, then a row per region and model, and the average as last column. The
rules for empty masks stand below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import SEPARATOR
from nnunetv2_mstkd.metrics.conventions import BRATS, empty_rules_text, metric_named
from nnunetv2_mstkd.statistics.bootstrap import Cube, cube, mean

FORMATS = ("markdown", "latex")
AVAILABLE = {"markdown": "\u25cf", "latex": r"$\bullet$"}
MISSING = {"markdown": "\u25cb", "latex": r"$\circ$"}
AVERAGE_HEAD = {"markdown": "average", "latex": "Avg."}
NO_VALUE = "-"

_LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
)


def subset_table(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    fmt: str = "markdown",
    models: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    digits: int | None = None,
    convention: str = BRATS,
    lesion_convention: str | None = None,
) -> str:
    """A metric of all models with every subset of modalities.

    Parameters
    ----------
    results:
        see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    metric:
        shares are printed in percent.
    fmt:
        ``"markdown"``, or ``"latex"`` (needs the package booktabs).
    models, regions:
        which, and in which order; default all. With several models the best one of each column is bold.
    digits:
        after the point; default 1 for percent and 2 for other units.
    convention, lesion_convention:
        the rules that the values were computed with, for the text below.

    Returns
    -------
    The table and the text below it, with the number of cases and, where there are any, of values that were left out.

    Raises
    ------
    ValueError
        for an unknown format, metric or convention, and for incomplete results.
    """
    _check_format(fmt)
    content = subset_content(
        results,
        metric=metric,
        models=models,
        regions=regions,
        digits=digits,
        convention=convention,
        lesion_convention=lesion_convention,
    )
    data, several = content.data, len(content.data.models) > 1
    texts = _emphasised(content, fmt)
    head = [
        [escaped(name, fmt), *([""] if several else []), *((AVAILABLE if dot else MISSING)[fmt] for dot in dots), ""]
        for name, dots in zip(data.modalities, content.available, strict=True)
    ]
    head[0][-1] = AVERAGE_HEAD[fmt]
    body = []
    for r, region in enumerate(data.regions):
        for m, model in enumerate(data.models):
            name = escaped(region, fmt) if m == 0 or fmt == "markdown" else ""
            body.append([name, *([escaped(model, fmt)] if several else []), *texts[m, :, r]])
    groups = len(data.models) if several else 0
    lines = _layout(head, body, fmt, groups, named=2 if several else 1)
    return "\n".join(lines) + "\n\n" + _below(content.notes, fmt)


class SubsetContent(NamedTuple):
    """What stands in a table of subsets, before any layout.

    Attributes
    ----------
    data:
        the values that it is made of.
    available:
        bool, shape (modalities, subsets).
    texts, best:
        shape (models, subsets and their average, regions): means as text, and whether a model is the best of several.
    notes:
        sentences that belong below, the rules for empty masks among them.
    """

    data: Cube
    available: np.ndarray
    texts: np.ndarray
    best: np.ndarray
    notes: list[str]


def subset_content(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    models: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    digits: int | None = None,
    convention: str = BRATS,
    lesion_convention: str | None = None,
) -> SubsetContent:
    """The content of :func:`subset_table`, which explains the parameters."""
    kind = metric_named(metric)
    notes = empty_rules_text(convention, [metric], lesion_convention=lesion_convention).splitlines()
    data = cube(results, metric, models=models, regions=regions)
    factor, unit, decimals = (100, "%", 1) if kind.unit == "%" else (1, kind.unit, 2)
    # (models, subsets and their average, regions)
    means = mean(data.values, axis=1) * factor
    means = np.concatenate([means, mean(means, axis=1)[:, None]], axis=1)
    texts, best = _texts(means, decimals if digits is None else digits, kind.better)
    about = f"{kind.label} in {unit}, mean of {len(data.cases)} case{'s' if len(data.cases) != 1 else ''}"
    left_out = int(np.isnan(data.values).sum())
    if left_out:
        about += f"; {left_out} of {data.values.size} values left out"
    notes = [f"{about}; average over {len(data.subsets)} subsets", *notes]
    members = [subset.split(SEPARATOR) for subset in data.subsets]
    available = np.array([[name in subset for subset in members] for name in data.modalities])
    return SubsetContent(data, available, texts, best, notes)


def frame_table(table: pd.DataFrame, *, fmt: str = "markdown", digits: int = 3) -> str:
    """Any table, for example one of :mod:`~nnunetv2_mstkd.statistics.tests`, in Markdown or LaTeX.

    Floats are rounded to ``digits``; a smaller p-value is printed as ``<0.001``.
    """
    _check_format(fmt)

    def text(value: object, column: str) -> str:
        if isinstance(value, float | np.floating):
            if np.isnan(value):
                return NO_VALUE
            if column in ("p", "p_corrected") and value < 10**-digits:
                return f"<{10**-digits:.{digits}f}" if fmt == "markdown" else f"$<${10**-digits:.{digits}f}"
            return f"{value:.{digits}f}"
        return escaped(str(value), fmt)

    head = [[escaped(str(name), fmt) for name in table.columns]]
    body = [
        [text(value, str(name)) for name, value in zip(table.columns, row, strict=True)]
        for row in table.itertuples(index=False)
    ]
    return "\n".join(_layout(head, body, fmt, 0, named=1))


def escaped(text: str, fmt: str) -> str:
    """Text that has no meaning to the format; a name in a results file may be anything."""
    if fmt == "latex":
        return text.translate(_LATEX_ESCAPES)
    # an underscore within a word has no meaning
    return re.sub(r"([\\|*]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _check_format(fmt: str) -> None:
    if fmt not in FORMATS:
        raise InputError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")


def _texts(means: np.ndarray, digits: int, better: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as text, and where a model is the best one of several; both of the shape of ``means``."""
    rounded = means.round(digits) + 0.0  # no -0.0
    texts = np.array([f"{value:.{digits}f}" for value in rounded.ravel()], dtype=object).reshape(means.shape)
    texts[np.isnan(means)] = NO_VALUE
    badness = np.where(np.isnan(rounded), np.inf, np.abs(rounded) if better == 0 else -better * rounded)
    # equal as printed: none of them is better as far as the table shows
    best = (badness == badness.min(axis=0)) & np.isfinite(badness) & (len(means) > 1)
    return texts, best


def _emphasised(content: SubsetContent, fmt: str) -> np.ndarray:
    """The texts with the best ones bold."""
    texts = content.texts.copy()
    for position in np.argwhere(content.best):
        text = texts[tuple(position)]
        texts[tuple(position)] = f"**{text}**" if fmt == "markdown" else rf"\textbf{{{text}}}"
    return texts


def _layout(head: list[list[str]], body: list[list[str]], fmt: str, group: int, *, named: int) -> list[str]:
    """Lines of a table: the rows of the head, a rule, the body; the first ``named`` columns are names."""
    columns = len(head[0])
    if fmt == "latex":
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
    if fmt == "markdown":
        return "\n".join(f"* {escaped(note, fmt)}" for note in notes)
    return "\n".join(
        [r"\par\footnotesize", *(rf"{escaped(note, fmt)}.\\" for note in notes[:-1]), f"{escaped(notes[-1], fmt)}."]
    )
