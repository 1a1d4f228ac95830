"""What unlabelled studies are worth: few labelled patients, many without a label, equal training time for every method.

    python benchmarks/few_labels.py RAW_DATASET --out FOLDER                    # every row, size and seed; resumable
    python benchmarks/few_labels.py RAW_DATASET --out FOLDER --labelled 16 --seeds 0 --rows dropout mstkd
    python benchmarks/few_labels.py RAW_DATASET --out FOLDER --report           # tables of what is finished

RAW_DATASET is a data set of nnU-Net's raw format in which every case has a label, such as one of ``mstkd convert lgg``.
Test patients, validation patients and the labelled ones are drawn among the complete cases; the labels of all others
are replaced by the ignore label. The test patients are the same for all seeds; the others depend on the seed.

A row has a teacher, trained on the labelled patients, and a second stage that starts from its weights and lasts equally
long in all rows: the number of its steps follows from the time per step, measured once for all rows in one process. A
row without a teacher has the steps of both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import SimpleITK as sitk
from accuracy_verdict import difference
from measured_training import read_cost

from nnunetv2_mstkd.images.atomic import read_json, write_json
from nnunetv2_mstkd.processes import command_path

HERE = Path(__file__).resolve().parent
PLANS, PARENT, FOLD = "nnUNetPlans", "2d", 0
TEACHER = "MSTKDTeacherTrainer"
TEACHERS = {
    "ModalityDropoutTrainer": TEACHER,
    "MSTKDTrainer": TEACHER,
    "KDTrainer": "KDTeacherTrainer",
}
WITHOUT_WORKERS = {"nnUNet_n_proc_DA": "0"}
"""For trainings: a seed repeats them then. nnU-Net's planner does not accept it."""
EVERY, COMPLETE = "every", "complete"
"""In place of a number of labelled patients: all that are left, or those of them that are complete."""


@dataclass(frozen=True)
class Row:
    """A way to train the second stage."""

    title: str
    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    """Has no first stage, whose steps it gets instead."""


WARM = {"schedule.init_from": TEACHER}
NO_UNLABELLED, OWN = {"unlabelled.share": 0}, {"unlabelled.share": 0.5}

NO_TERMS = {f"mstkd.{term}": 0 for term in ("evd", "maps", "discrepancy", "kl", "style", "adversarial")}
SOFT = {"distillation.where": "everywhere", "distillation.fade": 0, "distillation.soft_labels": 1}
ROWS = {
    "dropout": Row("modality dropout, labelled cases", "ModalityDropoutTrainer", {**WARM, **NO_UNLABELLED}),
    "dropout-scratch": Row(
        "modality dropout from scratch, labelled cases", "ModalityDropoutTrainer", NO_UNLABELLED, alone=True
    ),
    "dropout-self": Row("modality dropout, own pseudo-labels", "ModalityDropoutTrainer", {**WARM, **OWN}),
    "mstkd": Row("MSTKDTrainer, labelled cases", "MSTKDTrainer", NO_UNLABELLED),
    "mstkd-unlabelled": Row("MSTKDTrainer, unlabelled cases too", "MSTKDTrainer"),
    "unlabelled": Row("MSTKDTrainer without terms, unlabelled cases too", "MSTKDTrainer", NO_TERMS),
    "soft": Row(
        "MSTKDTrainer, soft labels alone, labelled cases", "MSTKDTrainer", {**NO_TERMS, **SOFT, **NO_UNLABELLED}
    ),
    "soft-unlabelled": Row(
        "MSTKDTrainer, soft labels alone, unlabelled cases too", "MSTKDTrainer", {**NO_TERMS, **SOFT}
    ),
    "plain-soft": Row("plain network, soft labels, labelled cases", "KDTrainer", NO_UNLABELLED),
    "plain-soft-2": Row(
        "the same, a teacher in every second step",
        "KDTrainer",
        {**NO_UNLABELLED, "distillation.every": 2},
    ),
    "plain-soft-4": Row(
        "the same, a teacher in every fourth step",
        "KDTrainer",
        {**NO_UNLABELLED, "distillation.every": 4},
    ),
    "plain-soft-unlabelled": Row("plain network, soft labels, unlabelled cases too", "KDTrainer"),
    "plain-unlabelled": Row("plain network, unlabelled cases too", "KDTrainer", {"distillation.soft_labels": 0}),
}
"""The results of ``plain`` rows of 2026-11-28 are from AdaMMTrainer with all of its parts off, which is the same."""
CONTROL = "dropout"
DEFAULT_ROWS = ("dropout", "dropout-self", "mstkd", "mstkd-unlabelled")


@dataclass
class Benchmark:
    """The options, and the folders that follow from them."""

    source: Path
    out: Path
    seconds: float
    teacher_epochs: int
    iterations: int
    batch_size: int
    features: Sequence[int]
    spacing: Sequence[float]
    test: int
    validation: int
    bfloat16: bool

    def __post_init__(self) -> None:
        for name in ("raw", "preprocessed", "results"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
            os.environ[f"nnUNet_{name}"] = str(self.out / name)
        os.environ.update(nnUNet_def_n_proc="1", nnUNet_compile="f", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

    # ---- data ----------------------------------------------------------------------------------------------------

    def divide(self, labelled: str, seed: int) -> dict[str, list[str]]:
        """The cases by their part: test, val, labelled, unlabelled."""
        content = read_json(self.source / "dataset.json")
        channels = len(content["channel_names"])
        cases = sorted(file.name.removesuffix("_0000.nii.gz") for file in self.source.glob("imagesTr/*_0000.nii.gz"))
        complete = [case for case in cases if all(_has(self.source, case, channel) for channel in range(channels))]
        random.Random(0).shuffle(complete)
        test, rest = sorted(complete[: self.test]), complete[self.test :]
        random.Random(1000 + seed).shuffle(rest)
        validation, rest = sorted(rest[: self.validation]), rest[self.validation :]
        others = sorted({*cases} - {*complete})
        if labelled in (EVERY, COMPLETE):
            return {"test": test, "val": validation, "labelled": rest + others * (labelled == EVERY), "unlabelled": []}
        number = int(labelled)
        return {"test": test, "val": validation, "labelled": rest[:number], "unlabelled": rest[number:] + others}

    def dataset(self, labelled: str, seed: int) -> str:
        """Its name: the number of labelled patients and the seed are its number."""
        size = {EVERY: 88, COMPLETE: 89}.get(labelled) or int(labelled)
        return f"Dataset{100 + 10 * size + seed:03d}_Few"

    def write_dataset(self, labelled: str, seed: int) -> Path:
        """The raw data set with ignore maps, planned and preprocessed; as it is if it is there already."""
        name, parts = self.dataset(labelled, seed), self.divide(labelled, seed)
        raw, preprocessed = self.out / "raw" / name, self.out / "preprocessed" / name
        if (preprocessed / "ready").is_file():
            return preprocessed
        shutil.rmtree(raw, ignore_errors=True)
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (raw / folder).mkdir(parents=True)
        content = read_json(self.source / "dataset.json")
        content = {key: value for key, value in content.items() if key != "mstkd_conversion"}
        ignore = 1 + max(max(np.atleast_1d(value)) for value in content["labels"].values())
        content["labels"]["ignore"] = int(ignore)
        for part, cases in parts.items():
            end = "Ts" if part == "test" else "Tr"
            for case in cases:
                for image in self.source.glob(f"imagesTr/{case}_[0-9][0-9][0-9][0-9].nii.gz"):
                    (raw / f"images{end}" / image.name).symlink_to(image.resolve())
                label = self.source / "labelsTr" / f"{case}.nii.gz"
                if part == "unlabelled":
                    empty = sitk.ReadImage(str(label)) * 0 + int(ignore)
                    sitk.WriteImage(sitk.Cast(empty, sitk.sitkUInt8), str(raw / "labelsTr" / label.name))
                else:
                    (raw / f"labels{end}" / label.name).symlink_to(label.resolve())
        content["numTraining"] = sum(len(cases) for part, cases in parts.items() if part != "test")
        write_json(raw / "dataset.json", content)
        number = name[7:10]
        run(
            *("nnUNetv2_plan_and_preprocess", "-d", number, "-c", PARENT, "-np", "1", "-npfp", "1"),
            *("-overwrite_target_spacing", *map(str, self.spacing)),
            log=self.out / f"{name}.log",
        )
        fold = {"train": sorted(parts["labelled"] + parts["unlabelled"]), "val": parts["val"]}
        write_json(preprocessed / "splits_final.json", [fold])
        (preprocessed / "ready").touch()
        return preprocessed

    # ---- trainings -----------------------------------------------------------------------------------------------

    def configure(self, labelled: str, seed: int, name: str, settings: Mapping[str, Any], parent: str) -> None:
        words = ["mstkd", "configure", "-d", self.dataset(labelled, seed)[7:10], "--name", name, "-c", parent]
        words.append("--overwrite")
        if parent == PARENT:
            words += ["--batch-size", str(self.batch_size), "--features", *map(str, self.features)]
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        run(*words, log=self.out / "configure.log")

    def common(self, seed: int) -> dict[str, Any]:
        return {
            "schedule.iterations": self.iterations,
            "schedule.validation_iterations": 4,
            "schedule.optimizer": "adamw",
            "schedule.seed": seed,
            "schedule.save_every": 5,
            "input.normalization": "plans",
        }

    def train(self, labelled: str, seed: int, trainer: str, configuration: str) -> Path:
        """Train, or continue, and return the model folder."""
        dataset = self.dataset(labelled, seed)
        model = self.out / "results" / dataset / f"{trainer}__{PLANS}__{configuration}"
        fold = model / f"fold_{FOLD}"
        if (fold / "checkpoint_final.pth").is_file():
            return model
        words = [sys.executable, str(HERE / "measured_training.py"), *(["--bfloat16"] if self.bfloat16 else [])]
        words += ["nnUNetv2_train", dataset[7:10], configuration, str(FOLD), "-tr", trainer, "-device", "cpu"]
        words += ["--c"] if any(fold.glob("checkpoint_*.pth")) else []
        run(*words, log=self.out / f"{dataset}_{trainer}_{configuration}.log", **WITHOUT_WORKERS)
        return model

    def evaluate(self, model: Path, dataset: str) -> None:
        raw, out = self.out / "raw" / dataset, self.out / "evaluations" / dataset / model.name
        if (out / "summary.json").is_file():
            return
        run(
            *("mstkd", "evaluate", "-m", str(model), "-f", str(FOLD), "-i", str(raw / "imagesTs")),
            *("-l", str(raw / "labelsTs"), "-o", str(out), "-device", "cpu", "--metrics", "dice"),
            *("--disable_progress_bar", "--strips", "0", "--stack", "7", "--disable_tta", "-npp", "0", "-nps", "0"),
            log=self.out / "evaluate.log",
        )

    def step_times(self, labelled: str, seed: int, rows: Sequence[str]) -> dict[str, float]:
        """Seconds per step of each row, in one process and interleaved; kept in a file."""
        file = self.out / "step_times.json"
        known = read_json(file) if file.is_file() else {}
        if set(rows) <= set(known):
            return known
        number = self.dataset(labelled, seed)[7:10]
        words = [sys.executable, str(HERE / "few_labels.py"), "--measure", str(file), number]
        options = ["--bfloat16"] if self.bfloat16 else []
        run(*words, *options, *rows, log=self.out / "step_times.log", **WITHOUT_WORKERS)
        return read_json(file)

    def run(self, labelled: str, seed: int, rows: Sequence[str]) -> None:
        """Everything of one size and seed that is not finished."""
        dataset, first = self.dataset(labelled, seed), f"first_s{seed}"
        self.write_dataset(labelled, seed)
        self.configure(labelled, seed, first, {**self.common(seed), "schedule.epochs": self.teacher_epochs}, PARENT)
        for teacher in sorted({TEACHER, *(TEACHERS[ROWS[row].trainer] for row in rows)}):
            self.evaluate(self.train(labelled, seed, teacher, first), dataset)
        given = {}
        for row in rows:
            given[row] = dict(ROWS[row].settings)
            if "schedule.init_from" in given[row]:
                model = f"{TEACHER}__{PLANS}__{first}"
                given[row]["schedule.init_from"] = f"{dataset}/{model}/fold_{FOLD}/checkpoint_final.pth"
            else:
                given[row]["teacher.configuration"] = first
            self.configure(labelled, seed, f"{row}_s{seed}", {**given[row], "schedule.epochs": 1}, first)
        seconds = self.step_times(labelled, seed, rows)
        for row in rows:
            epochs = max(1, round(self.seconds / (seconds[row] * self.iterations)))
            epochs += self.teacher_epochs * ROWS[row].alone
            self.configure(labelled, seed, f"{row}_s{seed}", {**given[row], "schedule.epochs": epochs}, first)
            self.evaluate(self.train(labelled, seed, ROWS[row].trainer, f"{row}_s{seed}"), dataset)
            mean = self.mean(labelled, seed, row)
            print(f"{labelled} labelled, seed {seed}, {row}: {mean:.2f} ({epochs} epochs)", flush=True)

    # ---- results -------------------------------------------------------------------------------------------------

    def values(self, labelled: str, seed: int, row: str) -> dict[str, dict[str, float]] | None:
        """Dice in points by subset and case; None if it is not finished."""
        import pandas as pd

        dataset = self.dataset(labelled, seed)
        name = (
            f"{TEACHER}__{PLANS}__first_s{seed}" if row == "teacher" else f"{ROWS[row].trainer}__{PLANS}__{row}_s{seed}"
        )
        file = self.out / "evaluations" / dataset / name / "results.csv"
        if not file.is_file():
            return None
        table = pd.read_csv(file)
        table = table[table["metric"] == "dice"].groupby(["subset", "case"])["value"].mean() * 100
        return {
            subset: {case: round(float(value), 3) for case, value in table[subset].items()}
            for subset in table.index.get_level_values(0).unique()
        }

    def mean(self, labelled: str, seed: int, row: str) -> float:
        found = self.values(labelled, seed, row)
        return fmean(fmean(cases.values()) for cases in found.values()) if found else float("nan")

    def hours(self, labelled: str, seed: int, row: str) -> float:
        dataset = self.dataset(labelled, seed)
        fold = self.out / "results" / dataset / f"{ROWS[row].trainer}__{PLANS}__{row}_s{seed}" / f"fold_{FOLD}"
        cost = read_cost(fold) or {"epochs": {}}
        return sum(entry["cpu_s"] for entry in cost["epochs"].values()) / 3600

    def report(self, sizes: Sequence[str], seeds: Sequence[int], rows: Sequence[str]) -> dict[str, Any]:
        """Means over the subsets, by size, row and seed, with the values of every case."""
        found: dict[str, Any] = {}
        for size in sizes:
            for row in ("teacher", *rows):
                values = {seed: self.values(size, seed, row) for seed in seeds}
                done = {seed: entry for seed, entry in values.items() if entry}
                if not done:
                    continue
                means = {seed: self.mean(size, seed, row) for seed in done}
                entry = {
                    "title": "full-modality teacher, given zeros" if row == "teacher" else ROWS[row].title,
                    "mean": round(fmean(means.values()), 2),
                    "seeds": {str(seed): round(mean, 2) for seed, mean in means.items()},
                    "subsets": {
                        subset: round(fmean(fmean(done[seed][subset].values()) for seed in done), 2)
                        for subset in next(iter(done.values()))
                    },
                    # by test case, in the order of their names
                    "cases": {
                        str(seed): {subset: list(cases.values()) for subset, cases in entry.items()}
                        for seed, entry in done.items()
                    },
                }
                if row != "teacher":
                    entry["cpu_hours"] = round(fmean(self.hours(size, seed, row) for seed in done), 4)
                found.setdefault(size, {})[row] = entry
            add_differences(found.get(size, {}))
        return found


def add_differences(entries: Mapping[str, dict[str, Any]]) -> None:
    """Add each row's mean minus the control's over their common seeds, with an interval over seeds and cases.

    With one common seed there is only an interval over cases, for these networks (``over_cases``).
    """
    import pandas as pd

    from nnunetv2_mstkd.evaluation.results import COLUMNS, TRAINING, subset_size

    for row, entry in entries.items():
        seeds = [seed for seed in entry["cases"] if seed in entries.get(CONTROL, {"cases": {}})["cases"]]
        if row == CONTROL or not seeds:
            continue
        values = [
            (name, "any", "0", f"{case:03d}", subset, subset_size(subset), "average", "dice", value / 100, seed)
            for name in (row, CONTROL)
            for seed in seeds
            for subset, of_subset in entries[name]["cases"][seed].items()
            for case, value in enumerate(of_subset)
        ]
        found = difference(pd.DataFrame(values, columns=[*COLUMNS, TRAINING]), row, CONTROL)
        limits = [round(found.pop(key), 2) for key in ("low", "high")]
        by_seed = dict(zip(seeds, found["by_seed"] or [found["difference"]], strict=True))
        entry["minus_control"] = {
            "difference": round(found["difference"], 2),
            "by_seed": {seed: round(value, 2) for seed, value in by_seed.items()},
            "interval" if len(seeds) > 1 else "over_cases": limits,
        }


def _has(source: Path, case: str, channel: int) -> bool:
    image = sitk.ReadImage(str(source / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
    return bool(sitk.GetArrayViewFromImage(image).any())


def run(*words: str, log: Path, **variables: str) -> None:
    """Run a command of this environment, with some variables set; its output goes to a log."""
    command = [words[0] if Path(words[0]).is_absolute() else command_path(words[0]), *words[1:]]
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(words)}\n")
        stream.flush()
        environment = {**os.environ, **variables}
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise SystemExit(f"{words[0]} ended with code {ended.returncode}; see {log}")


def measure(file: Path, dataset: str, rows: Sequence[str], bfloat16: bool, rounds: int = 20) -> None:
    """Write the seconds per step of rows, as the mean of interleaved steps: not all ask a teacher in every step."""
    import torch
    from measured_training import autocast_on_cpu
    from nnunetv2.run.run_training import get_trainer_from_args

    if bfloat16:
        autocast_on_cpu()
    torch.set_num_threads(1)
    trainers, times = {}, {row: [] for row in rows}
    for row in rows:
        plans = read_json(next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{dataset}_*")) / f"{PLANS}.json")
        name = next(name for name in plans["configurations"] if name.rsplit("_s", 1)[0] == row)
        with contextlib.redirect_stdout(io.StringIO()):
            trainers[row] = get_trainer_from_args(dataset, name, FOLD, ROWS[row].trainer, device=torch.device("cpu"))
            trainers[row].on_train_start()
            trainers[row].on_train_epoch_start()
    for number in range(rounds):
        for row, trainer in trainers.items():
            start = time.process_time()  # other processes do not count
            trainer.train_step(next(trainer.dataloader_train))
            trainer._step_in_epoch = 1 + number % (trainer.num_iterations_per_epoch - 1)
            times[row].append(time.process_time() - start)
    known = read_json(file) if file.is_file() else {}
    write_json(file, known | {row: round(float(np.mean(values[4:])), 4) for row, values in times.items()})
    for trainer in trainers.values():
        shutil.rmtree(trainer.output_folder, ignore_errors=True)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        file, dataset, *rows = sys.argv[2:]
        measure(Path(file), dataset, [row for row in rows if row != "--bfloat16"], "--bfloat16" in rows)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, metavar="RAW_DATASET")
    add("--out", type=Path, required=True)
    add("--labelled", nargs="+", default=["16", "8"], help="numbers of labelled patients, 'every' or 'complete'")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--rows", nargs="+", default=list(DEFAULT_ROWS), choices=list(ROWS))
    add("--seconds", type=float, default=120, help="length of the second stage on one thread")
    add("--teacher-epochs", type=int, default=12)
    add("--iterations", type=int, default=50, help="steps per epoch")
    add("--batch-size", type=int, default=8)
    add("--features", nargs="+", type=int, default=[12, 24, 48, 72, 96])
    add("--spacing", nargs=3, type=float, default=[5, 4, 4])
    add("--test", type=int, default=24)
    add("--validation", type=int, default=4)
    add("--bfloat16", action="store_true", help="autocast on a CPU")
    add("--report", action="store_true", help="only write the results of what is finished")
    add("--results", type=Path, help="JSON file to write the results to")
    args = vars(parser.parse_args())
    labelled, seeds, rows = (args.pop(name) for name in ("labelled", "seeds", "rows"))
    report, results = args.pop("report"), args.pop("results")
    benchmark = Benchmark(**args)
    if not report:
        for seed in seeds:
            for size in labelled:
                benchmark.run(size, seed, rows)
    found = benchmark.report(labelled, seeds, rows)
    for size, entries in found.items():
        for row, entry in entries.items():
            print(f"{size:>9} {row:22} {entry['mean']:6.2f}  {entry['seeds']}  {entry.get('cpu_hours', '')}")
            if less := entry.get("minus_control"):
                limits = less.get("interval", less.get("over_cases"))
                over = "seeds and cases" if "interval" in less else "cases alone"
                print(
                    f"{'':9} minus {CONTROL} {less['difference']:+.2f} {limits} over {over}, by seed {less['by_seed']}"
                )
    if results:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
        del settings["source"], settings["out"]
        machine = f"{platform.machine()}, one thread"
        content = {"date": date.today().isoformat(), "machine": machine, "data": benchmark.source.name, **settings}
        write_json(results, {**content, "rows": found})


if __name__ == "__main__":
    main()
