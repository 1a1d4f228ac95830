"""What an evaluation knows so far: a file per case, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import CASE, FOLD, METRIC, MODALITIES, MODEL, REGION, SUBSET, TRAINER, VALUE
from nnunetv2_mstkd.evaluation.scoring import SubsetScore
from nnunetv2_mstkd.evaluation.strips import CaseStrip, read_strip, write_strip
from nnunetv2_mstkd.inference.record import write_json
from nnunetv2_mstkd.modalities import SEPARATOR
from nnunetv2_mstkd.nnunet.file_names import check_file_name

FOLDER = "cases"
RUN = "run.json"


class CaseRecords:
    """The results of all cases, on disk.

    ``cases/run.json`` holds what all have in common, ``cases/fold_0/CASE.json`` the results of a case and ``CASE.npz``
    its pictures. Each file is at any moment absent, the old or the whole new one.

    Parameters
    ----------
    output:
        folder of the evaluation.
    run:
        model, options and rules: what results of one table must share.
    restart:
        forget what is there, on disk when :meth:`begin` is called.

    Raises
    ------
    ValueError
        if what is there was evaluated with another ``run``.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = output / FOLDER
        self._run = json.loads(json.dumps(run))
        self._forget = restart
        if not restart and (self.folder / RUN).is_file():
            before = _read(self.folder / RUN)
            for key, value in self._run.items():
                if before.get(key) != value:
                    raise InputError(
                        f"{output} was evaluated with {key} {before.get(key)!r}, now it is {value!r}; take the same "
                        f"options, another folder (-o), or --restart"
                    )
        self._weights: dict[str, str] = {}

    def use_weights(self, fold: str, fingerprint: str) -> None:
        """Say which weights a fold has; cases that others predicted are refused by :meth:`load`."""
        self._weights[fold] = fingerprint

    def begin(self) -> None:
        """Call before the first case is predicted, when nothing is left to be refused."""
        if self._forget and self.folder.is_dir():
            shutil.rmtree(self.folder)
        self._forget = False
        self.folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written ends the run here, not later

    def load(self, fold: str, case: str) -> dict[str, SubsetScore]:
        """The results of a case by subset; empty if there are none yet.

        Raises
        ------
        ValueError
            if the file is damaged or from other weights of the fold.
        """
        file = self._file(fold, case)
        if self._forget or not file.is_file():
            return {}
        content = _read(file)
        try:
            if content["weights"] != self._weights[fold]:
                raise InputError(
                    f"fold {fold} has other weights than those that predicted {case} for {self.folder.parent}; "
                    f"evaluate again with --restart"
                )
            return {
                subset: SubsetScore(_with_nan(entry["values"]), int(entry["near"]), int(entry["voxels"]))
                for subset, entry in content["subsets"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is no record of an evaluation ({error!r}); evaluate again with --restart"
            ) from error

    def load_strip(self, fold: str, case: str) -> CaseStrip | None:
        """The pictures of a case; None if there are none."""
        return None if self._forget else read_strip(self._file(fold, case, "npz"))

    def save(self, fold: str, case: str, scores: Mapping[str, SubsetScore], strip: CaseStrip) -> None:
        """Write all results of a case, and its pictures; those of an earlier run with other subsets are kept."""
        # first: the results tell that a case is done
        write_strip(strip.with_older(self.load_strip(fold, case)), self._file(fold, case, "npz"))
        file = self._file(fold, case)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not (self.folder / RUN).is_file():
            write_json(self.folder / RUN, self._run)  # not earlier: a run that finds nothing binds no later one
        subsets = {
            subset: {"values": _without_nan(score.values), "near": score.near, "voxels": score.voxels}
            for subset, score in scores.items()
        }
        write_json(file, {"weights": self._weights[fold], "subsets": subsets})

    def _file(self, fold: str, case: str, ending: str = "json") -> Path:
        return self.folder / f"fold_{fold}" / f"{check_file_name(case, 'a case id')}.{ending}"


def table(
    records: CaseRecords, cases: Iterable[tuple[str, str]], subsets: Sequence[str], *, model: str, trainer: str
) -> tuple[pd.DataFrame, tuple[int, int]]:
    """The long table of results; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.

    Parameters
    ----------
    records:
        complete for all of ``cases`` and ``subsets``.
    cases:
        fold and name of each.
    model, trainer:
        for the first two columns.

    Returns
    -------
    The table, and the voxels near the decision of all, with the number of all voxels.
    """
    rows, near, voxels = [], 0, 0
    for fold, case in cases:
        scores = records.load(fold, case)
        for subset in subsets:
            score = scores[subset]
            near, voxels = near + score.near, voxels + score.voxels
            size = subset.count(SEPARATOR) + 1
            rows += [
                (model, trainer, fold, case, subset, size, region, metric, value)
                for region, values in score.values.items()
                for metric, value in values.items()
            ]
    columns = [MODEL, TRAINER, FOLD, CASE, SUBSET, MODALITIES, REGION, METRIC, VALUE]
    return pd.DataFrame(rows, columns=columns), (near, voxels)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); evaluate again with --restart") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is no record of an evaluation; evaluate again with --restart")
    return content


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
