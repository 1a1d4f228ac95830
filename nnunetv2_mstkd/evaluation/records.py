"""The results of an evaluation on disk, one file per case, so that an interrupted run can continue."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.montage import Montage, read_montage, write_montage
from nnunetv2_mstkd.evaluation.results import COLUMNS, PRESENCE_COLUMNS, read_object, subset_size
from nnunetv2_mstkd.evaluation.scoring import SubsetScore
from nnunetv2_mstkd.images.atomic import write_json
from nnunetv2_mstkd.inference.evaluation_files import CASES, RUN, cases_file
from nnunetv2_mstkd.metrics.calibration import BINS
from nnunetv2_mstkd.nnunet.folders import check_file_name

HINT = "evaluate again with --restart"
"""What to do about a file that is not as it should be."""


class Collected(NamedTuple):
    """What is on record of evaluated cases."""

    results: pd.DataFrame
    """The long table, see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`."""
    near: tuple[int, int]
    """Numbers of voxels close to the decision and of all voxels."""
    entropies: dict[str, list[float]]
    """Entropies of the cases by subset, without those that have none."""
    presence: pd.DataFrame
    """What a presence head says, one row per case, subset and region, in the columns
    :data:`~nnunetv2_mstkd.evaluation.results.PRESENCE_COLUMNS`; empty without such a head."""
    calibration: dict[str, dict[str, np.ndarray]]
    """Sum over cases of :func:`~nnunetv2_mstkd.metrics.calibration.logit_counts`, by subset and region; empty if any
    case was evaluated before these were counted."""
    largest: pd.DataFrame
    """The Dice in ``results`` if only the largest component of the foreground is kept, as another such table; empty if
    any case was evaluated before this was measured."""
    lacking: dict[tuple[str, str], tuple[str, ...]]
    """Regions that the references lack, by fold and case; cases whose references have all are left out."""


class CaseRecords:
    """The results of all cases, on disk.

    ``cases/run.json`` holds what all results have in common, ``cases/fold_0/CASE.json`` the results of a case and
    ``CASE.npz`` its pictures. Every file is written atomically.

    Parameters
    ----------
    output:
        Output folder of the evaluation.
    run:
        Model, options and rules: what the results of one table must share; otherwise an InputError is raised.
    restart:
        Discard earlier results of the folds of :meth:`use_weights`, on disk when :meth:`begin` is called; those of
        all folds if they were made with another ``run``.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = output / CASES
        self._run = json.loads(json.dumps(run))
        self._discard = restart
        if not restart:
            self._check_same_run()
        self._weights: dict[str, str] = {}
        self._stamps: dict[tuple[str, str], dict[str, str]] = {}
        self.changed: set[tuple[str, str]] = set()
        """Fold and name of the cases whose results were not used because their files are other ones now."""

    def _check_same_run(self) -> None:
        """Raise InputError if there are results of another run, or of one that cannot be read."""
        if not (self.folder / RUN).is_file():
            return
        before = read_object(self.folder / RUN, HINT)
        for key, value in self._run.items():
            if before.get(key) != value:
                raise InputError(
                    f"{self.folder.parent} was evaluated with {key} {before.get(key)!r}, now it is {value!r}; take the "
                    f"same options, another folder (-o), or --restart"
                )

    def use_weights(self, fold: str, fingerprint: str) -> None:
        """Register the weights of a fold; :meth:`load` refuses cases that other weights predicted."""
        self._weights[fold] = fingerprint

    def begin(self) -> None:
        """Call before the first case is predicted, after all checks."""
        if self._discard:
            folders = [self.folder / f"fold_{fold}" for fold in self._weights]
            try:
                self._check_same_run()
            except InputError:
                folders = [self.folder]
            for folder in folders:
                if folder.is_dir():
                    shutil.rmtree(folder)
        self._discard = False
        self.folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written ends the run now, not later

    def note_cases(self, fold: str, cases: Sequence[str], *, complete: bool) -> None:
        """Write down which validation cases of a fold are evaluated: not those without a label, for example.

        ``complete`` says whether they have results for all subsets of their modalities.
        """
        write_json(cases_file(self.folder.parent, fold), {"cases": sorted(cases), "complete": complete})

    def load(
        self, fold: str, case: str, images: list[str] | None = None, stamps: Mapping[str, str] | None = None
    ) -> dict[str, SubsetScore]:
        """The results of a case by subset; empty if there are none yet, InputError if made with other weights.

        ``images`` are the modalities that preprocessing sees: results of a time when the case had others are not used.
        None: they do not matter. ``stamps`` are those of its files, from
        :meth:`~nnunetv2_mstkd.evaluation.cases.LabelledCase.stamps`: results from a file that was replaced are not used
        either, and :meth:`save` writes these, which were taken before the files are read.
        """
        file = self._file(fold, case)
        if stamps is not None:
            self._stamps[fold, case] = dict(stamps)
        if self._discard or not file.is_file():
            return {}
        content = read_object(file, HINT)
        if content.get("weights") != self._weights[fold]:
            raise InputError(
                f"fold {fold} has other weights than those that predicted {case} for {self.folder.parent}; "
                f"evaluate again with --restart"
            )
        try:
            before, now = dict(content.get("files") or {}), stamps or {}  # none in records of earlier versions
            others = images is not None and (content.get("images") or images) != images
            if others or any(before.get(key, stamp) != stamp for key, stamp in now.items()):
                self.changed.add((fold, case))
                return {}
            if stamps is not None:
                self._stamps[fold, case] = {**before, **stamps}  # a file that is away may come back as another one
            return {
                subset: SubsetScore(
                    _with_nan(entry["values"]),
                    int(entry["near"]),
                    int(entry["voxels"]),
                    entry.get("entropy"),
                    {
                        region: (float(score), bool(there))
                        for region, (score, there) in entry.get("presence", {}).items()
                    },
                    {region: _dense(counts) for region, counts in entry.get("calibration", {}).items()},
                    _with_nan(entry.get("largest", {})),
                    tuple(entry.get("lacking", ())),
                )
                for subset, entry in content["subsets"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise InputError(f"{file} is not a record of an evaluation ({error!r}); {HINT}") from error

    def load_montage(self, fold: str, case: str) -> Montage | None:
        """The pictures of a case; None if there are none."""
        return None if self._discard else read_montage(self._file(fold, case, "npz"))

    def save(
        self,
        fold: str,
        case: str,
        scores: Mapping[str, SubsetScore],
        montage: Montage,
        images: list[str] | None = None,
    ) -> None:
        """Write all results of a case and its pictures; pictures of an earlier run with other subsets are kept.

        For ``images`` see :meth:`load`.
        """
        older = None if (fold, case) in self.changed else self.load_montage(fold, case)
        # before the results, which say that a case is complete
        write_montage(montage.with_older(older), self._file(fold, case, "npz"))
        file = self._file(fold, case)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not (self.folder / RUN).is_file():
            write_json(self.folder / RUN, self._run)  # not earlier: a run without results must not bind later ones
        subsets = {
            subset: {
                "values": _without_nan(score.values),
                "near": score.near,
                "voxels": score.voxels,
                "entropy": score.entropy,
                **({"presence": score.presence} if score.presence else {}),
                "calibration": {region: _sparse(counts) for region, counts in score.calibration.items()},
                "largest": _without_nan(score.largest),
                "lacking": score.lacking,
            }
            for subset, score in scores.items()
        }
        files = self._stamps.get((fold, case), {})
        content = {"weights": self._weights[fold], "images": images, "files": files, "subsets": subsets}
        write_json(file, content, indent=None)  # indented, each count of logits is a line

    def collect(self, cases: Iterable[tuple[str, str, Sequence[str]]], *, model: str, trainer: str) -> Collected:
        """Everything that is on record of evaluated cases, each file read once.

        ``cases`` are their folds, names and subsets.
        """
        rows: list[tuple] = []
        of_components: list[tuple] = []
        stated: list[tuple] = []
        near, voxels = 0, 0
        entropies: dict[str, list[float]] = {}
        counts: dict[str, dict[str, np.ndarray]] = {}
        lacking: dict[tuple[str, str], tuple[str, ...]] = {}
        all_counted = all_components = True
        for fold, case, subsets in cases:
            scores = self.load(fold, case)
            for subset in subsets:
                score = scores[subset]
                near, voxels = near + score.near, voxels + score.voxels
                entropies.setdefault(subset, []).extend([] if score.entropy is None else [score.entropy])
                of_case = model, trainer, fold, case, subset, subset_size(subset)
                for table, scored in ((rows, score.values), (of_components, score.largest)):
                    table += [
                        (*of_case, region, metric, value)
                        for region, values in scored.items()
                        for metric, value in values.items()
                    ]
                stated += [(fold, case, subset, region, *of_region) for region, of_region in score.presence.items()]
                if score.lacking:
                    lacking[fold, case] = score.lacking
                all_counted &= bool(score.calibration)
                all_components &= bool(score.largest)
                of_subset = counts.setdefault(subset, {})
                for region, of_region in score.calibration.items():
                    of_subset[region] = of_subset.get(region, 0) + of_region
        return Collected(
            pd.DataFrame(rows, columns=list(COLUMNS)),
            (near, voxels),
            entropies,
            pd.DataFrame(stated, columns=list(PRESENCE_COLUMNS)),
            counts if all_counted else {},
            pd.DataFrame(of_components if all_components else [], columns=list(COLUMNS)),
            lacking,
        )

    def _file(self, fold: str, case: str, ending: str = "json") -> Path:
        return self.folder / f"fold_{fold}" / f"{check_file_name(case, 'a case id')}.{ending}"


def _sparse(counts: np.ndarray) -> list[list[int]]:
    """Counts of logits as (bin, all, in the reference), without empty bins."""
    return [[int(number), *map(int, counts[:, number])] for number in np.flatnonzero(counts[0])]


def _dense(entries: Sequence[tuple[int, int, int]]) -> np.ndarray:
    counts = np.zeros((2, BINS), np.int64)
    for number, *values in entries:
        counts[:, number] = values
    return counts


def _without_nan(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """JSON has no NaN."""
    return {
        region: {metric: None if math.isnan(value) else value for metric, value in of_region.items()}
        for region, of_region in values.items()
    }


def _with_nan(values: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        region: {metric: math.nan if value is None else float(value) for metric, value in of_region.items()}
        for region, of_region in values.items()
    }
