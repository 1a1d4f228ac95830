"""Which evaluations are compared: finding them, and refusing those that do not measure the same thing.

What is compared are the results of ``mstkd evaluate``, case by case. Everything here works on text and tables; no model
is loaded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.files import FOLDER, RESULTS, SUMMARY
from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODEL,
    REGION,
    SUBSET,
    TRAINER,
    VALUE,
    modality_order,
    patients_of,
    read_results,
    subset_order,
)
from nnunetv2_mstkd.metrics.conventions import LESION_RULES, NSD, metric_named
from nnunetv2_mstkd.statistics.bootstrap import SAMPLES
from nnunetv2_mstkd.statistics.tests import (
    AGAINST,
    compare,
    compare_by_count,
    compare_subsets,
    paired_differences,
    rank_table,
)

RULES = {"convention": "convention for empty masks", "regions": "labels in its regions"}
"""Keys of summary.json in which models must agree: their numbers have another meaning otherwise."""

CIRCUMSTANCES = {
    "dataset": "data set",
    "source": "source of the cases",
    "labels": "folder of labels",
    "checkpoint": "checkpoint",
    "mirroring": "mirroring",
    "step_size": "step size",
    "mask_first": "mask_first",
}
"""Keys in which models may differ, which is then said."""


LEVEL = 0.05
"""A reader looks for p-values below it."""


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    Attributes
    ----------
    name:
        of the model; no other one of the comparison has it.
    file:
        where they were read from.
    results:
        see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`; one model.
    settings:
        the content of summary.json beside the file; empty where there is none.
    """

    name: str
    file: Path
    results: pd.DataFrame
    settings: dict[str, Any]

    def distinct(self, column: str) -> list[str]:
        """What stands in a column, in order."""
        return list(dict.fromkeys(self.results[column]))


# ---- reading -------------------------------------------------------------------------------------------------------


def read_evaluations(arguments: Sequence[str]) -> list[Evaluation]:
    """Read the evaluations of two or more models.

    Parameters
    ----------
    arguments:
        ``PATH`` or ``NAME=PATH``; a path is a model folder, a folder with ``results.csv``, or such a file. Without a
        name the model is called as its results say, and a file may hold several models.

    Raises
    ------
    FileNotFoundError, ValueError
        for a path without an evaluation, a file given twice, two models of one name, or a single model.
    """
    found: list[Evaluation] = []
    files: dict[Path, str] = {}
    for argument in arguments:
        name, path = _name_and_path(argument)
        file = _results_file(path)
        before = files.setdefault(file.resolve(), argument)
        if before is not argument:
            raise InputError(f"{before} and {argument} are the same file {file}; name two different evaluations")
        results = read_results(file)
        models = list(dict.fromkeys(results[MODEL]))
        if name is not None and len(models) > 1:
            raise InputError(f"{file} holds the models {', '.join(models)}; leave out the name {name}=")
        settings = _settings(file.with_name(SUMMARY))
        for model in models:
            part = results[results[MODEL] == model].reset_index(drop=True)
            part[MODEL] = name or model
            found.append(Evaluation(name or model, file, part, settings))
    for first, second in itertools.combinations(found, 2):
        if first.name == second.name:
            raise InputError(
                f"{first.file} and {second.file} both hold a model {first.name!r}; name them: "
                f"mstkd compare A={first.file} B={second.file}"
            )
    if len(found) < 2:
        raise InputError(f"{found[0].file} holds one model, {found[0].name}; a comparison needs at least two")
    return found


def _name_and_path(argument: str) -> tuple[str | None, Path]:
    name, separator, rest = argument.partition("=")
    # a path may contain the sign too
    if not separator or Path(argument).exists():
        return None, Path(argument)
    if not name.strip() or not rest:
        raise InputError(f"{argument!r} is neither a path nor NAME=PATH")
    return name.strip(), Path(rest)


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"{path} does not exist; expected a model folder, or the results.csv of one")
    for file in (path / FOLDER / RESULTS, path / RESULTS):
        if file.is_file():
            return file
    if (path / "plans.json").is_file():
        raise MissingFileError(f"the model in {path} was not evaluated yet; evaluate it: mstkd evaluate -m {path}")
    raise MissingFileError(
        f"{path} is no model folder and has no {RESULTS}; results are made by mstkd evaluate -m MODEL_FOLDER"
    )


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); evaluate again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is no summary of an evaluation; evaluate again")
    return content


# ---- checking ------------------------------------------------------------------------------------------------------


def check_comparable(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> None:
    """Refuse evaluations that do not measure the same thing.

    Raises
    ------
    ValueError
        naming two models and what differs: modalities or their order, subsets, regions, rules; or a model without
        values of a metric.
    """
    for metric in metrics:
        metric_named(metric)
        for evaluation in evaluations:
            known = evaluation.distinct(METRIC)
            if metric not in known:
                raise InputError(
                    f"{evaluation.name} has no values of {metric}, it has {', '.join(known)}; evaluate it with "
                    f"--metrics {' '.join(dict.fromkeys([*known, metric]))}"
                )
    first = evaluations[0]
    for other in evaluations[1:]:
        _check_modalities(first, other)
        _check_same(first, other, SUBSET, "--subsets")
        _check_same(first, other, REGION, None)
        keys = dict(RULES)
        if any(metric in LESION_RULES for metric in metrics):
            keys["lesion_convention"] = "lesion-wise convention"
        if NSD in metrics:
            keys["tolerance"] = "tolerance of the normalised surface Dice"
        for key, words in keys.items():
            if key in first.settings and key in other.settings and first.settings[key] != other.settings[key]:
                raise InputError(
                    f"{first.name} and {other.name} were measured with another {words}: {first.settings[key]} and "
                    f"{other.settings[key]}; evaluate one of them again"
                )


def _check_modalities(first: Evaluation, other: Evaluation) -> None:
    mine, theirs = (modality_order(each.results[SUBSET]) for each in (first, other))
    if mine == theirs:
        return
    problem = "the same modalities in another order" if set(mine) == set(theirs) else "other modalities"
    raise InputError(
        f"{first.name} and {other.name} have {problem}: {', '.join(mine)} and {', '.join(theirs)}; only models of the "
        f"same channels can be compared"
    )


def _check_same(first: Evaluation, other: Evaluation, column: str, option: str | None) -> None:
    mine, theirs = set(first.distinct(column)), set(other.distinct(column))
    if mine == theirs:
        return
    parts = [
        f"only {name}: {', '.join(sorted(values)[:3])}{f' and {len(values) - 3} more' if len(values) > 3 else ''}"
        for name, values in ((first.name, mine - theirs), (other.name, theirs - mine))
        if values
    ]
    hint = f"; evaluate both with the same {option}" if option else ""
    raise InputError(f"{first.name} and {other.name} have different {column}s ({'; '.join(parts)}){hint}")


# ---- comparing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricComparison:
    """The comparison by one metric.

    Attributes
    ----------
    metric:
        its name.
    overall, per_case:
        :func:`~nnunetv2_mstkd.statistics.tests.compare` and ``paired_differences`` of all pairs.
    by_count, by_subset:
        ``compare_by_count`` and ``compare_subsets`` of all pairs, with the columns model and against in front.
    """

    metric: str
    overall: pd.DataFrame
    by_count: pd.DataFrame
    by_subset: pd.DataFrame
    per_case: pd.DataFrame


@dataclass
class Comparison:
    """Models compared case by case, on the cases that all of them have.

    Attributes
    ----------
    evaluations:
        from :func:`read_evaluations`, checked.
    metrics:
        names.
    baseline:
        the model that all others are compared with; None: each with each.
    samples, seed, level:
        of the bootstrap.
    cases, patients:
        that are compared; see :func:`~nnunetv2_mstkd.evaluation.results.patients_of`.
    not_compared:
        by model: cases that another model lacks.
    parts:
        a comparison per metric.
    ranks:
        over all metrics; None where values are left out (nan), which have no rank.
    notes:
        what a reader must know about this comparison, a sentence each.
    """

    evaluations: Sequence[Evaluation]
    metrics: Sequence[str] = ("dice",)
    baseline: str | None = None
    samples: int = SAMPLES
    seed: int = 0
    level: float = 0.95
    cases: list[str] = field(init=False)
    patients: dict[str, str] = field(init=False)
    not_compared: dict[str, list[str]] = field(init=False)
    parts: list[MetricComparison] = field(init=False)
    ranks: pd.DataFrame | None = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        check_comparable(self.evaluations, self.metrics)
        self._choose_cases()
        results = pd.concat([each.results for each in self.evaluations], ignore_index=True)
        results = results[results[CASE].isin(self.cases) & results[METRIC].isin(self.metrics)]
        options: dict[str, Any] = {
            "patients": self.patients,
            "samples": self.samples,
            "seed": self.seed,
            "level": self.level,
        }
        self.parts = [self._compare(results, metric, options) for metric in self.metrics]
        complete = not results[VALUE].isna().any()
        self.ranks = rank_table(results, metrics=self.metrics, **options) if complete else None
        self.notes = self._notes()

    @property
    def num_patients(self) -> int:
        return len(set(self.patients.values()))

    @property
    def subsets(self) -> tuple[str, ...]:
        subsets = self.evaluations[0].distinct(SUBSET)
        return subset_order(subsets, modality_order(subsets))

    def _choose_cases(self) -> None:
        of_model = {each.name: set(each.distinct(CASE)) for each in self.evaluations}
        shared = set.intersection(*of_model.values())
        if not shared:
            counts = ", ".join(f"{name} has {len(cases)} (such as {min(cases)})" for name, cases in of_model.items())
            raise InputError(f"no case was evaluated with all models: {counts}; evaluate them on the same cases")
        self.cases = sorted(shared)
        self.patients = patients_of(self.cases)
        self.not_compared = {name: sorted(cases - shared) for name, cases in of_model.items()}

    def _compare(self, results: pd.DataFrame, metric: str, options: dict[str, Any]) -> MetricComparison:
        overall = compare(results, metric=metric, baseline=self.baseline, **options)
        pairs = list(dict.fromkeys(zip(overall[MODEL], overall[AGAINST], strict=True)))

        def of_pairs(function: Any) -> pd.DataFrame:
            tables = []
            for model, against in pairs:
                table = function(results, model, against, metric=metric, **options)
                table.insert(0, MODEL, model)
                table.insert(1, AGAINST, against)
                tables.append(table)
            return pd.concat(tables, ignore_index=True)

        per_case = paired_differences(results, metric=metric, baseline=self.baseline)
        return MetricComparison(metric, overall, of_pairs(compare_by_count), of_pairs(compare_subsets), per_case)

    def _notes(self) -> list[str]:
        notes = []
        for name, cases in self.not_compared.items():
            if cases:
                more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
                notes.append(
                    f"not compared, because only some models have them: {', '.join(cases[:3])}{more} of {name}"
                )
        lowest = min(1.0, 2.0 ** (1 - self.num_patients))  # when all differences have one sign
        tables = {"over all subsets": "overall", "by number of modalities": "by_count", "by subset": "by_subset"}
        for words, name in tables.items():
            number = _tests_together(getattr(self.parts[0], name))
            if lowest * number > LEVEL:
                notes.append(
                    f"{words}: with {self.num_patients} patient{'s' if self.num_patients > 1 else ''} and {number} "
                    f"tests no corrected p-value can fall below {min(1.0, lowest * number):.2g}, whatever the models do"
                )
        if self.ranks is None:
            notes.append("no ranking: values are left out (nan) and have no rank; evaluate with --convention brats")
        first = self.evaluations[0]
        for other in self.evaluations[1:]:
            notes += [
                f"another {words}: {first.name} {first.settings[key]}, {other.name} {other.settings[key]}"
                for key, words in CIRCUMSTANCES.items()
                if key in first.settings and key in other.settings and first.settings[key] != other.settings[key]
            ]
        unknown = [each.name for each in self.evaluations if not each.settings]
        if unknown:
            notes.append(
                f"no {SUMMARY} beside the results of {', '.join(unknown)}: whether they were measured with the same "
                f"rules and options is not known"
            )
        for each in self.evaluations:
            folds = each.results.groupby(CASE)[FOLD].nunique()
            several = [case for case in self.cases if folds[case] > 1]
            if several:
                notes.append(f"{len(several)} cases of {each.name} were predicted by several folds and are averaged")
        return notes

    def about(self) -> list[dict[str, Any]]:
        """Each model in a few words, for the files that are written."""
        return [
            {
                "model": each.name,
                "results": str(each.file),
                "trainer": ", ".join(each.distinct(TRAINER)),
                "folds": sorted(each.distinct(FOLD)),
                "cases": len(each.distinct(CASE)),
                "not_compared": self.not_compared[each.name],
            }
            for each in self.evaluations
        ]


def _tests_together(table: pd.DataFrame) -> int:
    """How many tests Holm's procedure corrects together: all rows, or those of a pair where each pair has its own."""
    if "level" not in table:
        return int(table["p"].notna().sum())
    return int(table["p"].notna().groupby([table[MODEL], table[AGAINST]]).sum().max())
