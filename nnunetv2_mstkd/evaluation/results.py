"""The long table of results, ``results.csv``, one value per row: its columns, its checks, reading and writing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import read_json, write_text
from nnunetv2_mstkd.metrics.conventions import METRICS, metric_named

MODEL = "model"
TRAINER = "trainer"
FOLD = "fold"
CASE = "case"
SUBSET = "subset"
MODALITIES = "modalities"
REGION = "region"
METRIC = "metric"
VALUE = "value"

COLUMNS: Mapping[str, str] = {
    MODEL: "name of the model in tables, unique among the models of a comparison",
    TRAINER: "class of its trainer",
    FOLD: "fold that predicted the case, as text; several folds of one case are averaged",
    CASE: "identifier of the case",
    SUBSET: "available modalities joined by +, for example T1ce+FLAIR",
    MODALITIES: "their number",
    REGION: "region or class, for example ET",
    METRIC: f"one of {', '.join(METRICS)}",
    VALUE: "the number; empty or nan: left out of every mean",
}
"""Name and meaning of the columns, in the order of the file. Further columns are kept but not used."""

TRAINING = "training"
"""Optional column, not in files: tells several training runs of a model apart, such as those with different seeds."""

PATIENT = "patient"
"""Optional column: the patient of the case, where the data set's ``dataset.json`` tells how to find it; empty or nan:
not known."""

AVERAGE = "average"
"""The mean over the regions, beside them; no region of a data set may have this name."""

NOTED = ("convention", "lesion_convention", "tolerance")
"""Rules of an evaluation that the note below a table of its results names."""

SCORE, IN_REFERENCE = "presence", "in_reference"
PRESENCE_COLUMNS = (FOLD, CASE, SUBSET, REGION, SCORE, IN_REFERENCE)
"""Columns of ``presence.csv``: ``presence`` is the stated probability that the case has any voxel of the region,
``in_reference`` whether its reference has one."""

KEY = (MODEL, TRAINER, FOLD, CASE, SUBSET, REGION, METRIC)
"""No two rows agree in all of these columns and, where it is, in :data:`TRAINING`."""

SEPARATOR = "+"
"""Joins the modalities of a subset, as :data:`nnunetv2_mstkd.modalities.SEPARATOR`; this module avoids PyTorch."""


def check_results(results: pd.DataFrame) -> pd.DataFrame:
    """Check a table of results, which has at least the :data:`COLUMNS`, and return it in their order.

    Returns
    -------
    A new table, numbered from 0: text in all columns but ``modalities`` (integers) and ``value`` (floats).

    Raises
    ------
    InputError
        For the first row that is wrong: missing or empty cells, a duplicate row, a subset in two orders or with the
        wrong number of modalities, an unknown metric, a value that is infinite or out of the metric's range.
    """
    missing = [name for name in COLUMNS if name not in results.columns]
    if missing:
        if len(results.columns) == 1:
            raise InputError(f"the results have one column, {results.columns[0]!r}; separate columns by commas")
        raise InputError(
            f"the results have no column {', '.join(missing)}; expected are {', '.join(COLUMNS)}, found "
            f"{', '.join(map(str, results.columns)) or 'none'}"
        )
    if len(results) == 0:
        raise InputError("the results have no rows; evaluate at least one case")
    others = [name for name in results.columns if name not in COLUMNS]
    table = results[[*COLUMNS, *others]].reset_index(drop=True)
    for name in KEY:
        _refuse(table[name].isna(), table, f"has no {name}")
        table[name] = table[name].astype(str)
        _refuse(table[name].str.strip() == "", table, f"has no {name}")
    for name in (MODALITIES, VALUE):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
        blank = table[name].isna() | table[name].astype(str).str.strip().str.lower().isin(["", "nan"])
        _refuse(numbers.isna() & ~blank, table, f"has a {name} that is not a number")
        table[name] = numbers
    _check_subsets(table)
    table[MODALITIES] = table[MODALITIES].astype(int)
    for name in table[METRIC].unique():
        metric = metric_named(name)
        # NaN passes; with a margin for values that were printed and read again
        outside = (table[VALUE] < metric.lowest - 1e-9) | (table[VALUE] > metric.highest + 1e-9)
        _refuse(
            (table[METRIC] == name) & (outside | np.isinf(table[VALUE])),
            table,
            f"has a value outside {metric.lowest:g} ... {metric.highest:g}",
        )
    _refuse(table.duplicated([*KEY, *({TRAINING} & {*others})]), table, "appears twice")
    if PATIENT in others:
        text = table[PATIENT].astype("string").str.strip()
        table[PATIENT] = text.mask(text.str.lower().isin(["", "nan"])).astype(object)
        first = table.groupby(CASE)[PATIENT].transform("first")
        _refuse(table[PATIENT].notna() & (table[PATIENT] != first), table, "has a second patient")
    return table


def read_results(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read and check ``results.csv``; MissingFileError or InputError, as by :func:`check_results`."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; expected a table of results as mstkd evaluate writes it")
    try:
        # as text: a case 00012 keeps its zeros, and a region may be called NA
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of comma-separated values: {' '.join(str(error).split())}") from error
    try:
        table = check_results(table)
        _refuse(table[REGION] == AVERAGE, table, "has a region that is called like the mean over all regions")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return table


def write_results(results: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Check results and write them atomically, with all digits: reading gives the same table."""
    path, text = Path(path), check_results(results).to_csv(index=False, na_rep="nan", lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def read_object(file: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object that an evaluation wrote; for other content an InputError with the hint."""
    try:
        return read_json(file)
    except InputError as error:
        raise InputError(f"{error}; {hint}") from error


def subset_size(subset: str) -> int:
    """Number of modalities of a subset."""
    return subset.count(SEPARATOR) + 1


def first_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def modality_order(subsets: Iterable[str]) -> tuple[str, ...]:
    """The modalities in channel order, as far as the subsets tell it.

    Where they do not, modalities of larger subsets come first, then those that appear first.
    """
    parts = [subset.split(SEPARATOR) for subset in dict.fromkeys(subsets)]
    before: dict[str, set[str]] = {}
    for part in sorted(parts, key=lambda part: -len(part)):
        for place, name in enumerate(part):
            before.setdefault(name, set()).update(part[:place])
    order: list[str] = []
    left = list(before)
    while left:
        # without a modality that none is to precede, the subsets contradict each other
        order.append(next((name for name in left if before[name] <= set(order)), left[0]))
        left.remove(order[-1])
    return tuple(order)


def subset_order(subsets: Iterable[str], modalities: Sequence[str]) -> tuple[str, ...]:
    """Subsets by size, then by channel number: T1, T1ce ... T1+T1ce, T1+T2 ..., all."""
    position = {name: number for number, name in enumerate(modalities)}

    def key(subset: str) -> tuple[int, list[int]]:
        numbers = sorted(position[name] for name in subset.split(SEPARATOR))
        return len(numbers), numbers

    return tuple(sorted(dict.fromkeys(subsets), key=key))


_BRATS_CASE = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d+")


def patients_of(results: pd.DataFrame) -> dict[str, str]:
    """The patient of each case, for intervals: the cases of a patient are not independent.

    The column :data:`PATIENT` tells. Without it, ``BraTS-GLI-00005-100`` and ``BraTS-GLI-00005-101`` are two time
    points of one patient, as in BraTS from 2023 on, and with any other name each case counts as a separate patient.
    """
    patients = {}
    for case in results[CASE].unique():
        match = _BRATS_CASE.fullmatch(case)
        patients[case] = match.group(1) if match else case
    if PATIENT in results.columns:
        patients |= dict(results[[CASE, PATIENT]].dropna().drop_duplicates(CASE).to_numpy().tolist())
    return patients


def _check_subsets(table: pd.DataFrame) -> None:
    spellings: dict[frozenset[str], str] = {}
    sizes = {}
    for subset in table[SUBSET].unique():
        parts = subset.split(SEPARATOR)
        if any(part.strip() != part or not part for part in parts) or len(set(parts)) < len(parts):
            raise InputError(f"the subset {subset!r} is not a list of different modalities such as T1ce+FLAIR")
        first = spellings.setdefault(frozenset(parts), subset)
        if first != subset:
            raise InputError(f"the subset {first!r} is also written {subset!r}; write it in one order")
        sizes[subset] = len(parts)
    counts = table[SUBSET].map(sizes)
    _refuse(table[MODALITIES] != counts, table, "has a number of modalities other than its subset")


def _refuse(wrong: pd.Series, table: pd.DataFrame, what: str) -> None:
    """Raise InputError with the first row of ``table`` where ``wrong`` holds."""
    if not wrong.any():
        return
    position = int(np.flatnonzero(wrong)[0])
    row = ", ".join(f"{name}={table[name].iloc[position]}" for name in COLUMNS)
    more = int(wrong.sum()) - 1
    raise InputError(f"row {position + 1} {what} ({row}){f' and {more} more' if more else ''}")
