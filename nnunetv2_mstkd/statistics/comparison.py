"""Comparing evaluated models case by case: which evaluations, whether they measure the same, and all tables.

Everything here works on the files of ``mstkd evaluate``; no model is loaded.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODEL,
    PATIENT,
    REGION,
    SEPARATOR,
    SUBSET,
    TRAINER,
    TRAINING,
    VALUE,
    first_of,
    modality_order,
    patients_of,
    read_object,
    read_results,
    subset_order,
)
from nnunetv2_mstkd.inference.evaluation_files import FOLDER, RESULTS, SUMMARY
from nnunetv2_mstkd.metrics.conventions import BRATS, LESION_RULES, NSD, metric_named, postprocessed_regions
from nnunetv2_mstkd.statistics.bootstrap import Bootstrap, cube, mean, plain_regions, unsigned
from nnunetv2_mstkd.statistics.significance import (
    AGAINST,
    P,
    compare,
    compare_by_count,
    compare_subsets,
    paired_differences,
    rank_table,
)

RULES = {"convention": "convention for empty masks", "regions": "labels in its regions"}
"""Keys of summary.json in which models must agree, because the numbers mean something else otherwise."""

CIRCUMSTANCES = {
    "dataset": "data set",
    "source": "source of the cases",
    "labels": "folder of labels",
    "checkpoint": "checkpoint",
    "mirroring": "mirroring",
    "step_size": "step size",
    "mask_first": "mask_first",
}
"""Keys in which models may differ, which is then noted."""

PARAMETERS, HOURS = "parameters", "training_hours"
"""Keys of summary.json: what a model costs."""

UNEQUAL = 1.25
"""Ratio of training hours above which a comparison mentions them."""

LEVEL = 0.05
"""Readers look for p-values below it."""


@dataclass(frozen=True)
class EvaluatedModel:
    """The results of one training of a model."""

    name: str
    file: Path
    results: pd.DataFrame
    settings: dict[str, Any]
    """Content of summary.json beside the file; empty if there is none."""
    training: int | None = None
    """Number among the trainings of the same name, from 1; None: the only one."""

    @property
    def label(self) -> str:
        """Name, and number of the training where there are several; unique in a comparison."""
        return self.name if self.training is None else f"{self.name} ({self.training})"

    def cost(self, key: str) -> float:
        """Number of parameters or hours of training; NaN if the evaluation does not tell."""
        value = self.settings.get(key)
        return float(value) if isinstance(value, int | float) else math.nan

    def distinct(self, column: str) -> list[str]:
        """The distinct values of a column, in order of appearance."""
        return list(dict.fromkeys(self.results[column]))


Models = Mapping[str, str | os.PathLike | Sequence[str | os.PathLike]] | Sequence[str | os.PathLike]


# ---- reading -------------------------------------------------------------------------------------------------------


def read_evaluations(models: Models) -> list[EvaluatedModel]:
    """Read the evaluations of two or more models: paths by name, or a list of paths and of texts ``"NAME=PATH"``.

    A path is a model folder, a folder with ``results.csv``, or such a file. Without a name the model has the name in
    its results, and a file may hold several models. Several paths of one given name are trainings of that model, which
    are paired with those of other models in this order.

    Raises
    ------
    MissingFileError, InputError
        For a path without an evaluation, a duplicate file or name, or a single model.
    """
    if isinstance(models, Mapping):
        named: list[tuple[str | None, Path]] = [
            (name, Path(path))
            for name, given in models.items()
            for path in ([given] if isinstance(given, str | os.PathLike) else given)
        ]
    else:
        named = [_name_and_path(str(each)) for each in models]
    found: list[EvaluatedModel] = []
    seen: dict[Path, Path] = {}
    unnamed: set[str] = set()
    for name, path in named:
        file = _results_file(path)
        if file.resolve() in seen:
            raise InputError(
                f"{seen[file.resolve()]} and {path} are the same file {file}; name two different evaluations"
            )
        seen[file.resolve()] = path
        of_file = _read(name, file)
        for first, second in itertools.product(found, of_file):
            # only a name that both were given says that they are trainings of one model
            if first.name == second.name and (name is None or first.name in unnamed):
                raise InputError(
                    f"{first.file} and {second.file} both hold a model {first.name!r}; name them: "
                    f"mstkd compare A={first.file} B={second.file}, or both A if they are training runs of one model"
                )
        unnamed |= {each.name for each in of_file if name is None}
        found += of_file
    numbers = Counter(each.name for each in found)
    if len(numbers) < 2:
        about = f"{found[0].file} holds one model, {found[0].name}" if found else "no model is given"
        raise InputError(f"{about}; a comparison needs at least two")
    training: Counter[str] = Counter()
    for number, each in enumerate(found):
        training[each.name] += 1
        if numbers[each.name] > 1:
            found[number] = replace(each, training=training[each.name])
    return found


def _name_and_path(text: str) -> tuple[str | None, Path]:
    name, separator, rest = text.partition("=")
    # a path may contain the sign too
    if not separator or Path(text).exists():
        return None, Path(text)
    if not name.strip() or not rest:
        raise InputError(f"{text!r} is neither a path nor NAME=PATH")
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
        f"{path} is not a model folder and has no {RESULTS}; results are made by mstkd evaluate -m MODEL_FOLDER"
    )


def _read(name: str | None, file: Path) -> list[EvaluatedModel]:
    """The models of a file; a name is for the only one."""
    results, summary = read_results(file), file.with_name(SUMMARY)
    settings = read_object(summary, "evaluate again") if summary.is_file() else {}
    models = list(dict.fromkeys(results[MODEL]))
    if name is not None and len(models) > 1:
        raise InputError(f"{file} holds the models {', '.join(models)}; leave out the name {name}=")
    found = []
    for model in models:
        if len(models) > 1:  # a summary is about one model
            settings = {key: value for key, value in settings.items() if key not in (PARAMETERS, HOURS)}
        part = results[results[MODEL] == model].reset_index(drop=True)
        part[MODEL] = name or model
        found.append(EvaluatedModel(name or model, file, part, settings))
    return found


# ---- checking ------------------------------------------------------------------------------------------------------


def check_comparable(models: Sequence[EvaluatedModel], metrics: Sequence[str]) -> None:
    """Refuse models that were not measured in the same way: other modalities, subsets, regions, rules or metrics."""
    for metric in metrics:
        metric_named(metric)
        for model in models:
            known = model.distinct(METRIC)
            if metric not in known:
                raise InputError(
                    f"{model.label} has no values of {metric}, it has {', '.join(known)}; evaluate it with "
                    f"--metrics {' '.join(dict.fromkeys([*known, metric]))}"
                )
    keys = dict(RULES)
    if any(metric in LESION_RULES for metric in metrics):
        keys["lesion_convention"] = "lesion-wise convention"
    if NSD in metrics:
        keys["tolerance"] = "tolerance of the normalised surface Dice"
    first = models[0]
    for other in models[1:]:
        _check_modalities(first, other)
        _check_same(first, other, SUBSET, "--subsets")
        _check_same(first, other, REGION, None)
    for pair in itertools.combinations(models, 2):
        _check_patients(*pair)
    for words, first, other, mine, theirs in _different(models, keys):
        raise InputError(
            f"{first.label} and {other.label} were evaluated with another {words}: {mine} and {theirs}; evaluate one "
            f"of them again"
        )


def _different(
    models: Sequence[EvaluatedModel], keys: Mapping[str, str]
) -> Iterator[tuple[str, EvaluatedModel, EvaluatedModel, object, object]]:
    """The settings, in words, in which a model differs from the first one that tells them; both models and values."""
    for key, words in keys.items():
        first, *others = [each for each in models if key in each.settings] or [models[0]]
        for other in others:
            if other.settings[key] != first.settings[key]:
                yield words, first, other, first.settings[key], other.settings[key]


def _check_modalities(first: EvaluatedModel, other: EvaluatedModel) -> None:
    mine, theirs = (modality_order(each.results[SUBSET]) for each in (first, other))
    by_members = {frozenset(subset.split(SEPARATOR)): subset for subset in first.distinct(SUBSET)}
    if set(mine) != set(theirs):
        problem = "other modalities"
    elif any(by_members.get(frozenset(name.split(SEPARATOR)), name) != name for name in other.distinct(SUBSET)):
        problem = "the same modalities in another order"
    else:
        return
    raise InputError(
        f"{first.label} and {other.label} have {problem}: {', '.join(mine)} and {', '.join(theirs)}; only models of "
        f"the same channels can be compared"
    )


def _check_patients(first: EvaluatedModel, other: EvaluatedModel) -> None:
    mine, theirs = (
        each.results.dropna(subset=[PATIENT]).set_index(CASE)[PATIENT].to_dict() if PATIENT in each.results else {}
        for each in (first, other)
    )
    for case in mine.keys() & theirs.keys():
        if mine[case] != theirs[case]:
            raise InputError(
                f"{first.label} and {other.label} have different patients for case {case}, {mine[case]} and "
                f"{theirs[case]}; correct the column {PATIENT} in {first.file} or {other.file}"
            )


def _check_same(first: EvaluatedModel, other: EvaluatedModel, column: str, option: str | None) -> None:
    mine, theirs = set(first.distinct(column)), set(other.distinct(column))
    if mine == theirs:
        return
    parts = [
        f"only {name}: {first_of(sorted(values))}"
        for name, values in ((first.label, mine - theirs), (other.label, theirs - mine))
        if values
    ]
    hint = f"; evaluate both with the same {option}" if option else ""
    raise InputError(f"{first.label} and {other.label} have different {column}s ({'; '.join(parts)}){hint}")


# ---- comparing -----------------------------------------------------------------------------------------------------


class Comparison:
    """Models compared case by case, on the cases and subsets that all of them have.

    The tables have the columns metric, model and against, and those of the function that is named.

    Attributes
    ----------
    models, metrics, baseline:
        What is compared: models from :func:`read_evaluations`, all pairs of them if the baseline is None.
    trainings:
        The number of trainings by model.
    bootstrap, num_patients:
        The bootstrap of the intervals, over the patients of the cases, and their number.
    cases, not_compared, subsets:
        The cases that are compared, by model (and training) those that another lacks, and the subsets in order.
    counts, left_out:
        The number of cases by subset, and the number of pairs of a case and a subset that only some models have.
    partly_left_out:
        By metric, the number of values that some models have and others lack (nan), as where only one finds a region.
    overall, by_count, by_subset, per_case:
        :func:`~nnunetv2_mstkd.statistics.significance.compare`, ``compare_by_count``, ``compare_subsets`` and
        ``paired_differences``.
    ranks:
        ``rank_table`` over all metrics; None if values are left out (nan), which have no rank, or models have different
        numbers of trainings.
    results:
        The compared values of all models, with a column ``training``. Differences and ranks leave postprocessed regions
        such as ``ET (min 500)`` out.
    costs:
        A row per training: model, training, value (mean of the first metric over subsets and regions, in its own unit),
        parameters and training_hours, NaN where neither the evaluation nor ``hours`` tells.
    notes:
        What a reader must know about this comparison, a sentence each.
    """

    def __init__(
        self,
        models: Sequence[EvaluatedModel],
        *,
        metrics: Sequence[str] = ("dice",),
        baseline: str | None = None,
        hours: Mapping[str, float] | None = None,
    ) -> None:
        check_comparable(models, metrics)
        self.models, self.metrics, self.baseline = models, metrics, baseline
        self.trainings = dict(Counter(each.name for each in models))
        self._choose_pairs()
        results = pd.concat(
            [each.results.assign(**{TRAINING: each.training or 1}) for each in models], ignore_index=True
        )
        used = pd.MultiIndex.from_frame(results[[CASE, SUBSET]]).isin(self._pairs)
        patients = patients_of(results[used])
        self.bootstrap, self.num_patients = Bootstrap(patients), len(set(patients.values()))
        self.results = results = results[used & results[METRIC].isin(metrics)]
        self.partly_left_out = {name: self._partly_left_out(name) for name in metrics}
        self.costs = self._costs(hours or {})
        # a postprocessed region says the same once more, and each test makes the correction stricter
        results = results[~results[REGION].isin(postprocessed_regions(results[REGION].unique()))]
        self.per_case = self._by_metric(paired_differences, results)
        self.overall, self.by_count, self.by_subset = (
            self._by_metric(function, results, bootstrap=self.bootstrap)
            for function in (compare, compare_by_count, compare_subsets)
        )
        complete = not results[VALUE].isna().any() and len(set(self.trainings.values())) == 1
        self.ranks = rank_table(results, metrics=metrics, bootstrap=self.bootstrap) if complete else None
        on_trainings = self._notes_on_trainings() if self.several_trainings else self._notes_on_tests()
        self.notes = [*self._notes_on_hours(), *self._notes_on_cases(), *self._notes_on_left_out(), *on_trainings]
        self.notes += [*self._notes_on_ranks(), *self._notes_on_settings()]

    def _choose_pairs(self) -> None:
        """Choose the pairs of a case and a subset that all models have."""
        pairs = [set(zip(each.results[CASE], each.results[SUBSET], strict=True)) for each in self.models]
        self._pairs = set.intersection(*pairs)
        shared = {case for case, _ in self._pairs}
        of_model = {each.label: set(each.distinct(CASE)) for each in self.models}
        if not shared:
            counts = ", ".join(f"{name} has {len(cases)} (such as {min(cases)})" for name, cases in of_model.items())
            raise InputError(f"no case was evaluated with all models: {counts}; evaluate them on the same cases")
        self.cases = sorted(shared)
        self.not_compared = {name: sorted(cases - shared) for name, cases in of_model.items()}
        self.left_out = sum(case in shared for case, _ in set.union(*pairs) - self._pairs)
        numbers = Counter(subset for _, subset in self._pairs)
        self.subsets = subset_order(numbers, modality_order(self.models[0].results[SUBSET]))
        self.counts = {subset: numbers[subset] for subset in self.subsets}

    @property
    def uneven(self) -> bool:
        """Whether cases lack subsets."""
        return min(self.counts.values()) < len(self.cases)

    @property
    def several_trainings(self) -> bool:
        """Whether models have several training runs: intervals then include their variation, and there are no tests."""
        return max(self.trainings.values()) > 1

    def _costs(self, hours: Mapping[str, float]) -> pd.DataFrame:
        unknown = [name for name in hours if name not in self.trainings]
        if unknown:
            raise InputError(f"hours of {', '.join(unknown)}: no such model; they are {', '.join(self.trainings)}")
        data = cube(self.results, self.metrics[0])
        rows = []
        for name, trainings in zip(data.models, data.trainings, strict=True):
            by_region = mean(mean(unsigned(trainings, self.metrics[0]), axis=1), axis=1)  # over cases, then subsets
            values = mean(by_region[:, plain_regions(data.regions)], axis=1)
            of_name = [each for each in self.models if each.name == name]
            rows += [
                (name, each.training, value, each.cost(PARAMETERS), hours.get(name, each.cost(HOURS)))
                for each, value in zip(of_name, values, strict=True)
            ]
        return pd.DataFrame(rows, columns=[MODEL, TRAINING, VALUE, PARAMETERS, HOURS])

    def rule(self, key: str) -> Any:
        """A rule of measurement that all evaluations share, such as the convention; None if none of them tells."""
        return next((each.settings[key] for each in self.models if each.settings.get(key) is not None), None)

    def _by_metric(self, function: Callable[..., pd.DataFrame], results: pd.DataFrame, **options: Any) -> pd.DataFrame:
        tables = {name: function(results, metric=name, baseline=self.baseline, **options) for name in self.metrics}
        return pd.concat(tables, names=[METRIC, None]).reset_index(METRIC).reset_index(drop=True)

    def _notes_on_hours(self) -> Iterator[str]:
        hours = self.costs.groupby(MODEL, sort=False)[HOURS].mean()
        if hours.max() > UNEQUAL * hours.min():
            numbers = ", ".join(f"{name} {value:.2g}" for name, value in hours.dropna().items())
            yield f"not the same training time, and longer training alone makes a model better; hours: {numbers}"

    def _notes_on_cases(self) -> Iterator[str]:
        for name, cases in self.not_compared.items():
            if cases:
                yield f"not compared, because only some models have them: {first_of(cases)} of {name}"
        for each in self.models:
            folds = each.results.groupby(CASE)[FOLD].nunique()
            several = [case for case in self.cases if folds[case] > 1]
            if several:
                yield f"{len(several)} cases of {each.label} were predicted by several folds and are averaged"
        if self.left_out:
            yield f"not compared, because only some models have them: {self.left_out} subsets, each of one case"
        if self.uneven:
            numbers = self.counts.values()
            yield (
                f"subsets have {min(numbers)} to {max(numbers)} of {len(self.cases)} cases, those that have their "
                f"modalities: each case counts with the subsets that it has"
            )

    def _partly_left_out(self, metric: str) -> int:
        nan = np.isnan(cube(self.results, metric).values)
        return int((nan.any(axis=0) & ~nan.all(axis=0)).sum())

    def _notes_on_left_out(self) -> Iterator[str]:
        for name, partly in self.partly_left_out.items():
            if partly:
                advice = "" if self.rule("convention") == BRATS else "; --convention brats leaves none out"
                yield (
                    f"{metric_named(name).label}: {partly} values are left out (nan) of some models only, as where one "
                    f"finds a region that the reference lacks; differences leave them out of all models, and the "
                    f"means of a model do not, so the two may disagree{advice}"
                )

    def _notes_on_trainings(self) -> Iterator[str]:
        equal = len(set(self.trainings.values())) == 1
        numbers = ", ".join(f"{name} {number}" for name, number in self.trainings.items())
        yield (
            f"training runs: {numbers}; differences are between the means over training runs"
            f"{', which are paired in the order given' if equal else ', paired where both models have equally many'}"
        )
        first = self.by_subset[self.by_subset[METRIC] == self.metrics[0]].groupby([MODEL, AGAINST], sort=False)
        number = int(first.size().iloc[0])
        yield (
            f"intervals include the variation between training runs; there are no p-values, because a test over cases "
            f"would be about these networks alone; each interval is {100 * self.bootstrap.level:g} % by itself, so "
            f"without any difference {number * (1 - self.bootstrap.level):.1f} of the {number} by subset of a pair "
            f"would exclude 0"
        )

    def _notes_on_tests(self) -> Iterator[str]:
        yield (
            "intervals and p-values hold for these trained networks, not for the methods that trained them: another "
            "run gives another network; for methods, give several training runs of each: A=RESULTS1 A=RESULTS2 ..."
        )
        lowest = min(1.0, 2.0 ** (1 - self.num_patients))  # if all differences have one sign
        tables = {
            "over all subsets": self.overall,
            "by number of modalities": self.by_count,
            "by subset": self.by_subset,
        }
        for words, table in tables.items():
            number = _tests_together(table[table[METRIC] == self.metrics[0]])
            if lowest * number > LEVEL:
                yield (
                    f"{words}: with {self.num_patients} patient{'s' if self.num_patients > 1 else ''} and {number} "
                    f"tests no corrected p-value can fall below {min(1.0, lowest * number):.2g}, whatever the models do"
                )

    def _notes_on_ranks(self) -> Iterator[str]:
        if len(set(self.trainings.values())) > 1:
            yield "no ranking: it needs the same number of training runs of each model"
        elif self.ranks is None:
            advice = "" if self.rule("convention") == BRATS else "; evaluate with --convention brats"
            yield f"no ranking: values are left out (nan) and have no rank{advice}"

    def _notes_on_settings(self) -> Iterator[str]:
        for words, first, other, mine, theirs in _different(self.models, CIRCUMSTANCES):
            yield f"another {words}: {first.label} {mine}, {other.label} {theirs}"
        unknown = [each.label for each in self.models if not each.settings]
        if unknown:
            yield (
                f"no {SUMMARY} beside the results of {', '.join(unknown)}: whether they were measured with the same "
                f"rules and options is not known"
            )

    def about(self) -> list[dict[str, Any]]:
        """A description of each model, and each of its trainings, for the files of the comparison."""
        return [
            {
                "model": each.name,
                "training": each.training,
                "results": str(each.file),
                "trainer": ", ".join(each.distinct(TRAINER)),
                "folds": sorted(each.distinct(FOLD)),
                "cases": len(each.distinct(CASE)),
                "not_compared": self.not_compared[each.label],
            }
            for each in self.models
        ]


def _tests_together(table: pd.DataFrame) -> int:
    """How many tests Holm's procedure corrects together: all rows, or those of a pair if each pair has its own."""
    tests = table[P].notna()
    return int(tests.groupby([table[MODEL], table[AGAINST]]).sum().max() if "level" in table else tests.sum())
