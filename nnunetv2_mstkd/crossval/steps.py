"""The steps of a cross-validation: the command of each, what it needs, and how far it is.

A step knows from its own output whether it is done. Nothing else is stored, so steps that were run by hand count, and a
deleted result is made again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mstkd.crossval.locks import Lock
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import read_json
from nnunetv2_mstkd.inference.evaluation_files import CASES, COMPARISON, FOLDER, RESULTS, RUN, SUMMARY, cases_file
from nnunetv2_mstkd.nnunet.folders import CHECKPOINTS, FINAL, model_folder_name
from nnunetv2_mstkd.nnunet.splits import read_splits

NO_MIRRORING = "--disable_tta"
"""Option of ``mstkd evaluate``."""
LONGEST_NAME = 150
LOGS = "crossval"
"""Folder below nnUNet_results/DATASET for logs and locks of steps."""


class Progress(NamedTuple):
    """How far a step is: ``epoch 12 of 1000``. Numbers that are not known are None."""

    unit: str
    done: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        return self.unit if self.done is None else f"{self.unit} {self.done} of {self.total or '?'}"


@dataclass(frozen=True)
class Training:
    """A model, as nnU-Net's commands name it: by ``-d``, ``-c``, ``-tr``, ``-p``, ``-device`` and ``-num_gpus``."""

    results: Path  # nnUNet_results/DATASET
    dataset: str
    configuration: str
    trainer: str
    plans: str = "nnUNetPlans"
    device: str = "cuda"
    gpus: int = 1

    @property
    def folder(self) -> Path:
        """nnU-Net's folder of the model."""
        return self.results / model_folder_name(self.trainer, self.plans, self.configuration)

    @property
    def logs(self) -> Path:
        """Folder of logs and locks."""
        return self.results / LOGS


@dataclass(frozen=True)
class Step:
    """A command that makes or measures a model, and the keys of the steps that must be done before it."""

    model: Training
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the step, its log and its lock; unique in a data set."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Name of the step for people."""
        raise NotImplementedError

    @property
    def gpus(self) -> int:
        """Number of GPUs that it uses: one, if it runs on a GPU at all."""
        return 1 if self.model.device == "cuda" else 0

    def done(self) -> bool:
        """Whether its output is complete."""
        raise NotImplementedError

    def progress(self) -> Progress | None:
        """How far it is, from its files; None before there are any."""
        return None

    def command(self) -> list[str]:
        """The command that runs it, or resumes it."""
        raise NotImplementedError

    def check_options(self) -> None:
        """Refuse options that contradict what is there already: a step that is done is not run again."""

    def variables(self) -> dict[str, str]:
        """Environment variables that the command needs in addition to those of this process."""
        return {}

    @property
    def log(self) -> Path:
        """Log of its command."""
        return self.model.logs / f"{self.key}.log"

    @property
    def lock(self) -> Lock:
        """Lock that is held while it runs."""
        return Lock(self.log.with_suffix(".running"))


@dataclass(frozen=True)
class Train(Step):
    """Training and validation of one fold."""

    fold: int = 0

    @property
    def key(self) -> str:
        return f"{self.model.folder.name}.fold_{self.fold}.train"

    @property
    def title(self) -> str:
        return f"train {self.model.trainer} ({self.model.configuration}), fold {self.fold}"

    @property
    def output(self) -> Path:
        return self.model.folder / f"fold_{self.fold}"

    @property
    def gpus(self) -> int:
        return self.model.gpus * super().gpus

    def done(self) -> bool:
        return (self.output / FINAL).is_file() and (self.output / "validation" / "summary.json").is_file()

    def progress(self) -> Progress | None:
        if (self.output / FINAL).is_file():
            return Progress("validation")
        epochs = finished_epochs(self.output)
        return None if epochs is None else Progress("epoch", *epochs)

    def command(self) -> list[str]:
        model = self.model
        words = ["nnUNetv2_train", model.dataset, model.configuration, str(self.fold), "-tr", model.trainer]
        words += ["-p", model.plans, "-device", model.device]
        if model.gpus > 1:
            words += ["-num_gpus", str(model.gpus)]
        if (self.output / FINAL).is_file():
            return [*words, "--val"]  # needs no teacher
        if any((self.output / name).is_file() for name in CHECKPOINTS):
            words.append("--c")
        return words


@dataclass(frozen=True)
class Evaluate(Step):
    """All subsets of modalities on the validation cases of one fold, or of all folds together with the report.

    Results are kept per case, so the step over all folds only pools those of the folds. Its tables and its report
    must be those of exactly these folds: it is `pooled`.
    """

    folds: tuple[int, ...] = (0,)
    pooled: bool = False
    splits: Path = Path()  # nnU-Net's splits_final.json, which the first training writes
    options: tuple[str, ...] = ()  # of mstkd evaluate

    @property
    def key(self) -> str:
        what = "pool" if self.pooled else "evaluate"
        return f"{self.model.folder.name}.fold_{'_'.join(map(str, self.folds))}.{what}"

    @property
    def title(self) -> str:
        what, folds = ("evaluate", "fold") if len(self.folds) == 1 else ("pool", "folds")
        return f"{what} {self.model.trainer} ({self.model.configuration}), {folds} {' '.join(map(str, self.folds))}"

    @property
    def output(self) -> Path:
        return self.model.folder / FOLDER

    def done(self) -> bool:
        """Complete, and no older than the weights: ``mstkd evaluate`` refuses to mix those of two trainings.

        One that was asked for some subsets only is not complete.
        """
        files = [cases_file(self.output, fold) for fold in self.folds]
        complete = [read_json(file).get("complete") if file.is_file() else None for file in files]
        if False in complete:
            return False
        records = self._records()
        weights = [self.model.folder / f"fold_{fold}" / FINAL for fold in self.folds]
        if not records or not all(path.is_file() for path in (*records, *weights)):
            return False
        trained = max(path.stat().st_mtime for path in weights)
        times = [path.stat().st_mtime for path in records]
        reported, written = self._reported()
        if self.pooled:
            return reported == set(self.folds) and written >= max(trained, *times)
        # an evaluation that finds its records of these weights changes none of them; tables may be those of other folds
        noted = min(file.stat().st_mtime for file in files) if all(complete) else 0.0
        return max(min(times), noted, written if set(self.folds) <= reported else 0.0) >= trained

    def progress(self) -> Progress | None:
        records = self._records()
        present = sum(path.is_file() for path in records)
        return Progress("case", present, len(records)) if present else None

    def command(self) -> list[str]:
        model = self.model
        words = ["mstkd", "evaluate", "-d", model.dataset, "-c", model.configuration, "-tr", model.trainer]
        words += ["-p", model.plans, "-f", *map(str, self.folds), "-device", model.device, *self.options]
        if len(self.folds) == 1 and self._is_of_other_weights(self.folds[0]):  # several are pooled after these
            words.append("--restart")
        return [*words, "--disable_progress_bar"]

    def _is_of_other_weights(self, fold: int) -> bool:
        """Whether a fold was trained again after its cases were evaluated; a copied checkpoint is only younger."""
        weights = self.model.folder / f"fold_{fold}" / FINAL
        records = [path for path in self._records() if path.is_file()]
        oldest = min(records, key=lambda path: path.stat().st_mtime, default=None)
        if oldest is None or not weights.is_file() or oldest.stat().st_mtime >= weights.stat().st_mtime:
            return False
        from nnunetv2_mstkd.nnunet import checkpoints  # imports torch

        return read_json(oldest).get("weights") != checkpoints.fingerprint(checkpoints.read(weights)["network_weights"])

    def _reported(self) -> tuple[set[int], float]:
        """The folds of the tables and report, and when these were written; none if they are not complete."""
        table, last = self.output / RESULTS, self.output / SUMMARY
        if not table.is_file() or not last.is_file() or last.stat().st_mtime < table.stat().st_mtime:
            return set(), 0.0
        return _folds_in(table), table.stat().st_mtime

    def _records(self) -> list[Path]:
        """The file of each validation case of the folds, there or not; those of a folder of images may lie beside them.

        An evaluation that has begun has noted its cases; before, and after a change of the split, they are the split's.
        """
        if not self.splits.is_file():
            return []
        splits, records = read_splits(self.splits), []
        for fold in self.folds:
            noted = self._noted(fold)
            cases = noted["cases"] if noted else splits[fold]["val"]
            records += [self.output / CASES / f"fold_{fold}" / f"{case}.json" for case in cases]
        return records

    def _noted(self, fold: int) -> dict[str, Any]:
        """What the evaluation of a fold has noted since the split was written; empty if it has not begun."""
        file = cases_file(self.output, fold)
        known = file.is_file() and self.splits.is_file() and file.stat().st_mtime >= self.splits.stat().st_mtime
        return read_json(file) if known else {}

    def check_options(self) -> None:
        """Refuse options that differ from those of the results that are there: they would count as these."""
        run = self.output / CASES / RUN
        mirrored = read_json(run).get("mirroring") if run.is_file() else None
        if mirrored is not None and mirrored == (NO_MIRRORING in self.options):
            raise InputError(
                f"{self.output} was evaluated {'with' if mirrored else 'without'} mirroring; "
                f"{'leave out' if mirrored else 'give'} {NO_MIRRORING}, or remove that folder"
            )


@dataclass(frozen=True)
class Compare(Step):
    """The comparison of all models, from their pooled evaluations."""

    models: tuple[Training, ...] = ()

    @property
    def key(self) -> str:
        trainers = "__".join(model.trainer for model in self.models)
        if len(trainers) > LONGEST_NAME:  # of a file, with what follows
            digest = hashlib.sha1(trainers.encode(), usedforsecurity=False).hexdigest()[:8]
            trainers = f"{self.models[0].trainer}_and_{len(self.models) - 1}_others_{digest}"
        return f"{trainers}__{self.model.plans}__{self.model.configuration}.compare"

    @property
    def title(self) -> str:
        return f"compare {', '.join(model.trainer for model in self.models)}"

    @property
    def gpus(self) -> int:
        return 0

    @property
    def output(self) -> Path:
        return self.model.logs / self.key

    def done(self) -> bool:
        page = self.output / COMPARISON
        inputs = [model.folder / FOLDER / RESULTS for model in self.models]
        made = [path.stat().st_mtime for path in self.output.glob("*") if path.is_file()]
        return page.is_file() and all(path.is_file() and path.stat().st_mtime <= min(made) for path in inputs)

    def command(self) -> list[str]:
        named = [f"{model.trainer}={model.folder}" for model in self.models]
        return ["mstkd", "compare", *named, "-o", str(self.output)]


def finished_epochs(folder: Path) -> tuple[int, int | None] | None:
    """The finished epochs in ``fold_k`` of a model and their total (None if not known); None before a training."""
    logs = sorted(folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
    finished, epoch = 0, None
    for log in logs:  # a resumed training has several; each continues where the one before was stopped
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            match = re.search(r": Epoch (\d+)\s*$", line)
            if match:
                epoch = int(match.group(1))
            elif "Epoch time:" in line and epoch is not None:
                finished = epoch + 1
    return (finished, _total_epochs(folder)) if logs else None


def _total_epochs(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / "debug.json").read_text(encoding="utf-8"))["num_epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folds_in(table: Path) -> set[int]:
    with table.open(encoding="utf-8", newline="") as stream:
        return {int(row["fold"]) for row in csv.DictReader(stream) if row["fold"].isdigit()}
