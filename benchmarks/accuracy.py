"""Does distillation help? Every trainer with one data set, one network and one budget, over several seeds.

    python benchmarks/accuracy.py --preset cpu --out FOLDER --dry-run     # all steps and the estimated time
    python benchmarks/accuracy.py --preset cpu --out FOLDER               # hours; a second call goes on
    python benchmarks/accuracy.py --preset full --out FOLDER --jobs 4     # nnU-Net's own widths, CUDA
    python benchmarks/accuracy.py --preset cpu --out FOLDER --only mstkd mstkd-zero dropout dropout-warm full --seeds 0
    python benchmarks/accuracy.py --preset cpu --out FOLDER --report      # tables of what is finished, runs nothing
    python benchmarks/accuracy.py --preset slices --data RAW_DATASET --hours 0.1 --out FOLDER --only dropout-warm kd

Without `--data` the cases are synthetic. With it they come from a data set in nnU-Net's raw format, such as one of
`mstkd convert`; `--labelled 16` keeps the labels of 16 patients and trains on the others without. `--hours` gives every
model the same time in place of the same steps: the time of a step is measured once, for all rows in one process (rows
that are added later are timed beside one of the first). The stored hours of whole trainings also depend on what else
the machine did, by up to a sixth.

What is trained stands in `accuracy_rows.py`, what is asked of the result in `accuracy_verdict.py`. A finished run is
skipped, a stopped one goes on. JSON (with the values of all cases), tables and figure go to benchmarks/results (preset
tiny: to FOLDER), the comparison of `mstkd compare` to FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from accuracy_data import COMPLETE, divide, make_data
from accuracy_rows import (
    DATASET,
    DATASET_NAME,
    FLOOR,
    FOLD,
    LONGER,
    PLANS,
    PRESETS,
    ROWS,
    STUDENT,
    Preset,
    Row,
    chosen_rows,
    estimated_hours,
    first_assignments,
    first_stage,
)
from gradient_ratio import GRADIENTS
from measured_training import read_cost

from nnunetv2_mstkd.crossval.steps import Progress, Step, Train, Training
from nnunetv2_mstkd.images.atomic import read_json
from nnunetv2_mstkd.inference.evaluation_files import RESULTS
from nnunetv2_mstkd.nnunet.folders import FINAL

HERE = Path(__file__).resolve().parent
RECORD = "benchmark.json"
STEP_TIMES = "step_times.json"


# ---- steps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredTrain(Train):
    """A training that notes its cost and, where ``keep``, leaves weights on the way for :class:`Gradients`."""

    keep: bool = False
    bfloat16: bool = False

    def command(self) -> list[str]:
        options = ["--keep"] if self.keep else []
        # on CUDA nnU-Net's own mixed precision holds
        options += ["--bfloat16"] if self.bfloat16 and self.model.device == "cpu" else []
        return [sys.executable, str(HERE / "measured_training.py"), *options, *super().command()]


def _follows_training(model: Training, file: Path) -> bool:
    """Whether a file is there that was made of the model's final weights, not of those that they have replaced."""
    weights = model.folder / f"fold_{FOLD}" / FINAL
    return weights.is_file() and file.is_file() and file.stat().st_mtime >= weights.stat().st_mtime


@dataclass(frozen=True)
class EvaluateTestCases(Step):
    """All subsets, or the one that a row is for, on the test cases."""

    raw: Path = Path()
    folder: Path = Path()
    subset: str | None = None
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.model.folder.name}.test"

    @property
    def title(self) -> str:
        return f"evaluate {self.model.trainer} ({self.model.configuration}), test cases"

    def done(self) -> bool:
        return _follows_training(self.model, self.folder / RESULTS)

    def progress(self) -> Progress | None:
        number = len(list(self.folder.glob("cases/*/*.json")))
        return Progress("case", number) if number else None

    def command(self) -> list[str]:
        words = ["mstkd", "evaluate", "-m", str(self.model.folder), "-f", str(FOLD), "-o", str(self.folder)]
        words += ["-i", str(self.raw / "imagesTs"), "-l", str(self.raw / "labelsTs"), "-device", self.model.device]
        words += ["--subsets", self.subset] if self.subset else []
        # a table that is there but does not count is that of weights which were trained anew
        words += ["--restart"] if (self.folder / RESULTS).is_file() and not self.done() else []
        return [*words, *self.options, "--disable_progress_bar"]


@dataclass(frozen=True)
class Gradients(Step):
    """How strongly each term pulls, from the weights that the training left on its way."""

    @property
    def key(self) -> str:
        return f"{self.model.folder.name}.gradients"

    @property
    def title(self) -> str:
        return f"gradients of {self.model.trainer} ({self.model.configuration})"

    def done(self) -> bool:
        return _follows_training(self.model, self.model.folder / f"fold_{FOLD}" / GRADIENTS)

    def command(self) -> list[str]:
        words = [
            sys.executable,
            str(HERE / "gradient_ratio.py"),
            self.model.dataset,
            self.model.configuration,
            str(FOLD),
        ]
        return [*words, "-tr", self.model.trainer, "-device", self.model.device]


@dataclass
class Benchmark:
    """A preset in a folder, with nnU-Net's three folders inside.

    Attributes
    ----------
    out:
        the folder.
    name:
        of the preset.
    device:
        in place of the preset's; None: the preset's.
    data:
        raw data set; None: the phantom.
    labelled:
        number of its patients that keep their label, or ``all`` or ``complete``.
    changes:
        fields of the preset with other values.
    """

    out: Path
    name: str
    device: str | None = None
    data: Path | None = None
    labelled: str = COMPLETE
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def preset(self) -> Preset:
        file = self.out / STEP_TIMES
        return dataclasses.replace(
            PRESETS[self.name], **self.changes, step_seconds=read_json(file) if file.is_file() else {}
        )

    @property
    def title(self) -> str:
        """The part of the names of result files that says what was run."""
        data = [self.data.name.split("_", 1)[-1].lower(), self.labelled] if self.data else []
        changes = [f"{key}{value:g}".replace("label_noise", "noise") for key, value in self.changes.items() if value]
        return "_".join([self.name, *data, *changes])

    @property
    def dataset(self) -> str:
        return f"Dataset{DATASET:03d}_{DATASET_NAME}"

    @property
    def raw(self) -> Path:
        return self.out / "raw" / self.dataset

    @property
    def plans_file(self) -> Path:
        return self.out / "preprocessed" / self.dataset / f"{PLANS}.json"

    def training(self, trainer: str, configuration: str) -> Training:
        device = self.device or self.preset.device
        return Training(self.out / "results" / self.dataset, str(DATASET), configuration, trainer, PLANS, device)

    def evaluation(self, row: Row, seed: int) -> Path:
        return self.out / "evaluations" / row.configuration(seed)

    def first_stages(self, rows: Sequence[Row], seed: int) -> list[Step]:
        """The trainings that rows start from, each once."""
        steps = [
            MeasuredTrain(self.training(row.first, row.first_stage(seed)), fold=FOLD, bfloat16=self.preset.bfloat16)
            for row in rows
            if row.first
        ]
        return list({step.key: step for step in steps}.values())

    def steps(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Step]:
        """Steps such that each comes after those that it needs; all rows of a seed before the next seed."""
        steps: dict[str, Step] = {}
        for seed in seeds:
            for row in rows:
                first = self.first_stages([row], seed)
                steps |= {step.key: step for step in first if step.key not in steps}
                needs = tuple(step.key for step in first)
                model = self.training(row.trainer, row.configuration(seed))
                train = MeasuredTrain(model, needs, fold=FOLD, keep=row.terms, bfloat16=self.preset.bfloat16)
                folder, options = self.evaluation(row, seed), (*self.preset.evaluation, "--name", row.name)
                own: list[Step] = [
                    train,
                    EvaluateTestCases(
                        model, (train.key,), raw=self.raw, folder=folder, subset=row.subset, options=options
                    ),
                ]
                own += [Gradients(model, (train.key,))] if row.terms else []
                steps.update({step.key: step for step in own})
        return list(steps.values())

    # ---- data ------------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Claim the folder and point nnU-Net's variables into it.

        Raises
        ------
        ValueError
            if it holds something else.
        """
        from nnunetv2_mstkd.demo.steps import FOLDERS, environment

        data = {"data": str(self.data), "labelled": self.labelled} if self.data else {}
        record = json.loads(json.dumps({"preset": self.name, **dataclasses.asdict(self.preset), **data}))
        file = self.out / RECORD
        if file.is_file():
            there = json.loads(file.read_text(encoding="utf-8"))
            keys = [*record, *(key for key in ("data", "labelled") if key in there and key not in record)]
            different = [key for key in keys if key not in _NOT_DATA and there.get(key) != record.get(key)]
            if different:
                listed = ", ".join(f"{key} {there.get(key)!r} (now {record.get(key)!r})" for key in different)
                raise ValueError(f"{self.out} holds a benchmark with {listed}; choose another folder with --out")
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no benchmark; choose another folder with --out")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for name in ("nnUNet_def_n_proc", "nnUNet_n_proc_DA"):
            os.environ.pop(name, None)
        for name, value in environment(self.out).items():
            os.environ[name] = value
            if name in FOLDERS:
                Path(value).mkdir(exist_ok=True)

    def configure(self, rows: Sequence[Row], seeds: Sequence[int]) -> None:
        """A configuration per row and seed in the plans, as ``mstkd configure`` writes them.

        Raises
        ------
        ValueError
            if a row's settings have changed since it was begun in this folder.
        """
        from nnunetv2_mstkd.methods.configuration import configure
        from nnunetv2_mstkd.nnunet.plans import read_plans

        preset = self.preset
        planned = read_plans(self.plans_file)["configurations"][preset.configuration]["architecture"]["arch_kwargs"]
        widths = preset.stages(len(planned["strides"]))
        for seed in seeds:
            for variant in sorted({"", *(row.variant for row in rows)}):
                plans, name = read_plans(self.plans_file), first_stage(seed, variant)
                entry = configure(
                    plans, preset.configuration, name, features=widths, batch_size=preset.batch_size,
                    assignments=first_assignments(preset, seed, variant),
                )  # fmt: skip
                self._write(name, entry)
            for row in rows:
                plans = read_plans(self.plans_file)
                changes = row.assignments(preset, seed)
                entry = configure(plans, row.first_stage(seed), row.configuration(seed), assignments=changes)
                self._write(row.configuration(seed), entry)

    def measure_steps(self, rows: Sequence[Row], seed: int) -> None:
        """Note the time per step of rows and first stages where it is not known; their first stages are trained.

        They are timed beside a row without a first stage whose time is known, if there is one.
        """
        known = self.preset.step_seconds
        wanted = {row.name: (row.trainer, row.configuration(seed)) for row in rows}
        wanted |= {row.first: (row.first, row.configuration(seed)) for row in rows if row.first}
        if not wanted.keys() - known.keys():
            return
        timed = {name: each for name, each in wanted.items() if name not in known}
        reference = next((row for row in ROWS if row.name in known and not row.first), None)
        if reference is not None:
            self.configure([reference], [seed])
            timed[reference.name] = (reference.trainer, reference.configuration(seed))
        print(f"time of a step of {', '.join(timed)}", flush=True)
        options = ["--bfloat16"] if self.preset.bfloat16 else []
        words = [sys.executable, str(HERE / "step_times.py"), *options, str(DATASET), str(FOLD)]
        words += [self.device or self.preset.device, str(self.out / STEP_TIMES)]
        words += [f"{name}={trainer}:{configuration}" for name, (trainer, configuration) in timed.items()]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        from nnunetv2_mstkd.methods.configuration import complete_block
        from nnunetv2_mstkd.nnunet.plans import BLOCK, read_plans, write_configuration

        there = read_plans(self.plans_file)["configurations"].get(name)
        if there is not None:
            # settings that a later version has added have their defaults in both
            both = [{**each, BLOCK: complete_block(each[BLOCK])} for each in (there, entry)]
            if json.loads(json.dumps(both[0])) == json.loads(json.dumps(both[1])):
                return
            begun = [path for path in (self.out / "results" / self.dataset).glob(f"*__{name}/fold_*/checkpoint_*.pth")]
            if begun:
                raise ValueError(
                    f"{begun[0].parent} was trained with other settings than the table now gives {name}; choose "
                    f"another folder with --out, or remove that model"
                )
        write_configuration(self.plans_file, name, entry, overwrite=True)

    # ---- results ---------------------------------------------------------------------------------------------------

    def finished(self, rows: Sequence[Row], seeds: Sequence[int]) -> tuple[list[Row], list[str]]:
        """Rows with all seeds evaluated, and the names of the others."""
        done: dict[str, bool] = {}
        for row in rows:
            steps = [step for step in self.steps([row], seeds) if isinstance(step, EvaluateTestCases)]
            done[row.name] = all(step.done() for step in steps)
        return [row for row in rows if done[row.name]], [name for name, there in done.items() if not there]

    def results(self, rows: Sequence[Row], seeds: Sequence[int]) -> Any:
        """The values of all cases; the row as model, and the seed in the column ``training``."""
        import pandas as pd

        from nnunetv2_mstkd.evaluation.results import MODEL, TRAINING, read_results

        tables = [
            read_results(self.evaluation(row, seed) / RESULTS).assign(**{MODEL: row.name, TRAINING: str(seed)})
            for row in rows
            for seed in seeds
        ]
        return pd.concat(tables, ignore_index=True)

    def cost(self, row: Row, seeds: Sequence[int]) -> dict[str, float] | None:
        """Hours of all stages (means over the seeds), parameters, and the peak memory of the row's own training."""
        own = [read_cost(self._fold(row.trainer, row.configuration(seed))) for seed in seeds]
        first = [read_cost(self._fold(row.first, row.first_stage(seed))) for seed in seeds] if row.first else []
        if not all([*own, *first]):
            return None
        hours = {
            key: sum(epoch[f"{clock}_s"] for cost in [*own, *first] for epoch in cost["epochs"].values()) / 3600
            for key, clock in (("hours", "wall"), ("cpu_hours", "cpu"))
        }
        return {
            **{key: value / len(seeds) for key, value in hours.items()},
            "parameters": own[0]["parameters"],
            "memory_mib": max(cost["memory_mib"] for cost in own),
        }

    def gradients(self, row: Row, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """What :class:`Gradients` found, by seed."""
        files = [self._fold(row.trainer, row.configuration(seed)) / GRADIENTS for seed in seeds]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]

    def _fold(self, trainer: str, configuration: str) -> Path:
        return self.training(trainer, configuration).folder / f"fold_{FOLD}"

    def about(self, rows: Sequence[Row], seeds: Sequence[int], missing: Sequence[str]) -> dict[str, Any]:
        """Machine, versions, data and budget."""
        from importlib.metadata import version

        import torch
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        import nnunetv2_mstkd

        preset, cuda = self.preset, (self.device or self.preset.device) == "cuda"
        plans = PlansManager(str(self.plans_file)).get_configuration(rows[0].configuration(seeds[0]))
        widths = plans.network_arch_init_kwargs["features_per_stage"]
        gpu = torch.cuda.get_device_name() if cuda and torch.cuda.is_available() else "CPU"
        return {
            "preset": self.name,
            "seeds": list(seeds),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}",
            # without a GPU other work on the machine changes the time of the wall, and not that of the process
            "clock": "hours" if cuda else "cpu_hours",
            "date": date.today().isoformat(),
            "versions": {
                "nnunetv2_mstkd": nnunetv2_mstkd.__version__,
                "nnunetv2": version("nnunetv2"),
                "torch": torch.__version__,
            },
            "data": {
                **self._about_cases(),
                "test_cases": preset.test_cases,
                "seed": preset.data_seed,
                **({"label_noise": preset.label_noise} if preset.label_noise else {}),
                "patch": list(plans.patch_size),
                "batch": plans.batch_size,
                "widths": list(widths),
            },
            "budget": _budget(preset),
            "not_measured": list(missing),
        }

    def _about_cases(self) -> dict[str, Any]:
        """Where the cases come from, and how many are trained on."""
        preset = self.preset
        if self.data is None:
            return {"recipe": preset.recipe, "spacing": preset.spacing, "training_cases": preset.training_cases}
        parts = divide(self.data, preset, self.labelled)
        spacing = list(preset.target_spacing) if preset.target_spacing else "nnU-Net's own"
        numbers = {"training_cases": len(parts.labelled), "unlabelled_cases": len(parts.unlabelled)}
        return {"name": self.data.name, "spacing": spacing, **numbers}

    def report(self, seeds: Sequence[int], folder: Path, student: str = STUDENT) -> None:
        """Write and print all rows of the table that are finished with these seeds.

        Parameters
        ----------
        student
            The row that the verdict is about.

        Raises
        ------
        ValueError
            if nothing is.
        """
        import pandas as pd
        from accuracy_report import (
            case_values,
            compact_json,
            control_at_equal_hours,
            dedicated_numbers,
            figure,
            mean_gradients,
            page,
            row_numbers,
        )
        from accuracy_verdict import best_of, subset_differences, verdict

        from nnunetv2_mstkd.images.atomic import write_text
        from nnunetv2_mstkd.reporting.figures import save_figure

        finished, missing = self.finished(ROWS, seeds)
        general = [row for row in finished if row.subset is None]
        if not general:
            raise ValueError(f"no row has been evaluated with all seeds ({', '.join(map(str, seeds))}) yet")
        results = self.results(general, seeds)
        controls = [row.name for row in ROWS if row.kind == "control" and row.name != student]
        best = best_of(results, controls)
        numbers = row_numbers(results, general, best)
        for row in general:
            facts = {"title": row.title, "kind": row.kind, "trainer": row.trainer, "steps": row.iterations(self.preset)}
            numbers[row.name] = {**facts, **numbers[row.name], "cost": self.cost(row, seeds)}
        about = self.about(general, seeds, missing)
        longer = folder / f"accuracy_{LONGER.get(self.title)}.json"
        if longer.is_file():
            control_at_equal_hours(numbers, json.loads(longer.read_text(encoding="utf-8"))["rows"], about["clock"])
        findings = verdict(
            results, student=student, controls=controls, floor=FLOOR, training_cases=about["data"]["training_cases"]
        )
        dedicated = [row for row in finished if row.subset is not None]
        of_subset = self.results(dedicated, seeds) if dedicated else None
        comparable = student in numbers and best is not None
        content = {
            "about": about,
            "student": student,
            "best_control": best,
            "rows": numbers,
            "verdict": [{"claim": line.claim, "found": line.found, "result": line.word} for line in findings],
            "subsets": subset_differences(results, student, best).to_dict("records") if comparable else [],
            "dedicated": dedicated_numbers(results, of_subset, dedicated, [student, *([best] if best else []), FLOOR])
            if dedicated
            else [],
            "gradients": mean_gradients({row.name: self.gradients(row, seeds) for row in general if row.terms}),
            "cases": case_values(pd.concat([results, *([of_subset] if dedicated else [])])),
        }
        name = f"accuracy_{self.title}"
        write_text(folder / f"{name}.json", compact_json(content))
        text = page(content, general)
        write_text(folder / f"{name}.md", text)
        save_figure(figure(content, general), folder / f"{name}.png")
        self._compare(general, seeds, student)
        print(text)
        print(f"written to {folder / name}.json, .md and .png; all pairs in {self.out / 'comparison'}")

    def _compare(self, rows: Sequence[Row], seeds: Sequence[int], student: str) -> None:
        """What `mstkd compare` says of the same values, the student (or the first row) against all others."""
        from nnunetv2_mstkd.reporting.compare import compare

        if len(rows) > 1:
            models = {row.name: [self.evaluation(row, seed) for seed in seeds] for row in rows}
            baseline = student if student in models else rows[0].name
            compare(models, baseline=baseline, output=self.out / "comparison")


def _budget(preset: Preset) -> dict[str, Any]:
    """Of every model, in steps or in hours."""
    first = preset.first_epochs * preset.iterations
    if preset.hours is not None:
        return {"first": first, "hours": preset.hours, "step_seconds": dict(preset.step_seconds)}
    student = preset.student_epochs * preset.iterations
    return {"first": first, "student": student, "total": first + student}


_NOT_DATA = ("seconds_per_step", "where", "device", "evaluation", "step_seconds")
"""Of a preset: what the results do not depend on, or what `mstkd evaluate` checks itself."""


# ---- command line --------------------------------------------------------------------------------------------------


def show(benchmark: Benchmark, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Every step with its command, and the estimated time."""
    steps = benchmark.steps(rows, seeds)
    for step in steps:
        print(f"{'done   ' if step.done() else 'to do  '} {step.title}\n        {shlex.join(step.command())}")
    preset = benchmark.preset
    budget = f"{(preset.first_epochs + preset.student_epochs) * preset.iterations} training steps"
    print(f"\nbudget of every model: {budget if preset.hours is None else f'{preset.hours:g} hours'}")
    hours = estimated_hours(rows, preset, seeds)
    for name, value in hours.items():
        print(f"{value:9.2f} h  {name}")
    print(
        f"{sum(hours.values()):9.2f} h  in all, {len(seeds)} seeds, without data and preprocessing; estimated for "
        f"{preset.where}"
    )
    print(f"{len(steps)} steps, {sum(step.done() for step in steps)} of them done")


def main() -> int:
    """Run, or show, or report; exit code 1 if a step failed, 2 for a mistake of the user, 130 if stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, models and values")
    parser.add_argument("--data", type=Path, metavar="RAW_DATASET", help="DatasetXXX_NAME (default: the phantom)")
    parser.add_argument("--labelled", help="patients of --data that keep their label: N, all or complete (the default)")
    parser.add_argument("--hours", type=float, help="of each model, both stages (default: equal steps)")
    parser.add_argument("--first-epochs", type=int, help="of the first stage (default: the preset's)")
    parser.add_argument("--label-noise", type=float, metavar="MM", help="move the boundaries of training labels")
    parser.add_argument("--student", default=STUDENT, help=f"row that the verdict is about (default: {STUDENT})")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    parser.add_argument("--jobs", type=int, default=1, help="steps at once (default: 1)")
    parser.add_argument("--gpus", help="0,1: share these GPUs out among the steps (default: each step sees all)")
    parser.add_argument("--results", type=Path, help="folder of the tables (default: benchmarks/results; tiny: --out)")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is finished")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and the estimated time, do nothing")
    args = parser.parse_args()
    try:
        return run(args)
    except ValueError as error:
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("accuracy.py: stopped; the same command goes on", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """What the command line asks for."""
    rows, seeds = chosen_rows(args.only), list(dict.fromkeys(args.seeds))
    changes = {key: getattr(args, key) for key in ("hours", "first_epochs", "label_noise")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if args.labelled and not args.data:
        raise ValueError("--labelled is for --data; all cases of the phantom are labelled")
    chosen_rows([args.student])
    benchmark = Benchmark(
        args.out.resolve(), args.preset, args.device, args.data and args.data.resolve(), args.labelled or COMPLETE,
        changes,
    )  # fmt: skip
    if args.dry_run:
        show(benchmark, rows, seeds)
        return 0
    benchmark.enter()
    left = 0
    if not args.report:
        from nnunetv2_mstkd.crossval.local import Outcome, run_steps

        signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: stop what runs
        make_data(benchmark.out, benchmark.preset, benchmark.data, benchmark.labelled)
        gpus = [text for text in (args.gpus or "").split(",") if text]

        def run_all(steps: list[Step]) -> Outcome:
            return run_steps(steps, jobs=args.jobs, gpus=gpus, report=lambda line: print(line, flush=True))

        with contextlib.redirect_stdout(io.StringIO()):
            benchmark.configure(rows, seeds)
        if benchmark.preset.hours is not None:
            # a student's step can be timed once its teacher is there, and its epochs follow from that time
            run_all(benchmark.first_stages(rows, seeds[0]))
            benchmark.measure_steps(rows, seeds[0])
            with contextlib.redirect_stdout(io.StringIO()):
                benchmark.configure(rows, seeds)
        outcome = run_all(benchmark.steps(rows, seeds))
        for key, reason in outcome.left.items():
            print(f"not run {key}: {reason}")
        left = len(outcome.failed) + len(outcome.left)
    results = args.results or (benchmark.out if args.preset == "tiny" else HERE / "results")
    benchmark.report(seeds, results, args.student)
    return 1 if left else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
