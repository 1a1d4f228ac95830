"""The demo, step by step: data, plans, teacher, student, predictions with missing modalities, result."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.demo import inputs, steps
from nnunetv2_mstkd.nnunet import configuration
from nnunetv2_mstkd.phantom.dataset import write_dataset
from nnunetv2_mstkd.training.settings import TERMS

DATASET = 901
NAME = "Demo"
CONFIGURATION = "demo"
NO_DISTILLATION = "demo_no_distillation"
EQUAL_BUDGET = "demo_equal_budget"
"""For FullModalityTrainer: as many iterations as teacher and student together."""
CHANNELS = ("T1", "T1ce", "T2", "FLAIR")
VALIDATION_CASES = 2

FEATURES = (12, 24, 48, 96)
ITERATIONS = 50
TEACHER_EPOCHS = 14
STUDENT_EPOCHS = 9
SETTINGS: dict[str, Any] = {
    "schedule.optimizer": "adamw",
    "schedule.initial_lr": 1e-3,
    "schedule.validation_iterations": 4,
}
"""Widths, length and rates with which two CPU cores need at most 15 minutes; see documentation/decisions.md."""


@dataclass(frozen=True)
class Options:
    """What the result of a demo depends on."""

    device: str
    epochs: int | None
    cases: int
    test_cases: int
    spacing: float
    seed: int
    anatomy: str
    controls: bool

    @property
    def student_epochs(self) -> int:
        return STUDENT_EPOCHS if self.epochs is None else self.epochs

    @property
    def teacher_epochs(self) -> int:
        """In the default proportion to the student's."""
        if self.epochs is None:
            return TEACHER_EPOCHS
        return max(1, round(self.epochs * TEACHER_EPOCHS / STUDENT_EPOCHS))


@dataclass(frozen=True)
class Model:
    """One trained model of the demo."""

    title: str
    short: str
    trainer: str
    configuration: str

    @property
    def folder(self) -> str:
        return f"{self.trainer}__nnUNetPlans__{self.configuration}"


TEACHER = Model("teacher given zeros", "teacher", "MSTKDTeacherTrainer", CONFIGURATION)
STUDENT = Model("MST-KDNet student", "student", "MSTKDTrainer", CONFIGURATION)
CONTROLS = (
    Model("nnU-Net given zeros", "nnU-Net control", "FullModalityTrainer", EQUAL_BUDGET),
    Model("student, no distillation", "no-distillation control", "MSTKDTrainer", NO_DISTILLATION),
)

SECONDS_PER_VOXEL_STEP = 4.4e-6
"""Of a teacher's training step on two CPU cores, per voxel of the batch; measured, for the printed budget only."""


def budget(options: Options) -> list[tuple[str, float]]:
    """Estimated minutes per step on two CPU cores."""
    voxels = 2 * 170 * 200 * 160 / options.spacing**3
    step = SECONDS_PER_VOXEL_STEP * voxels
    models = 2 + (len(CONTROLS) if options.controls else 0)
    teacher = options.teacher_epochs * (ITERATIONS * step + 3)
    student = options.student_epochs * (ITERATIONS * step * 1.5 + 5)
    minutes = [
        ("data and preprocessing", 30 + options.cases),
        ("teacher (all modalities)", teacher + 25),
        ("student (missing modalities)", student + 25),
    ]
    if options.controls:
        minutes.append(("controls", teacher + 2 * student + 50))
    minutes.append((f"predictions of {models} models", models * (15 + options.test_cases * 15 * (0.25 + 2 * step / 5))))
    return [(name, seconds / 60) for name, seconds in minutes]


class Demo:
    """Runs the steps that are not done yet in ``folder``."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder.resolve()
        self.options = options
        self.state = steps.State(self.folder, asdict(options) | {"controls": False})
        self.dataset = f"Dataset{DATASET:03d}_{NAME}"
        self.raw = self.folder / "raw" / self.dataset
        self.models = [TEACHER, *(CONTROLS if options.controls else ()), STUDENT]

    # ---- steps ---------------------------------------------------------------------------------------------------

    def run(self) -> list[str]:
        """All steps; returns the identifiers ``CASE__SUBSET`` that were predicted."""
        self._once("data", self._write_data)
        self._once("preprocessing", self._preprocess)
        self._configure()
        for model in self._training_order():
            self._once(f"train {model.folder}", lambda model=model: self._train(model))
        subsets = modalities.all_subsets(len(CHANNELS))
        identifiers = inputs.write_subset_inputs(self.raw / "imagesTs", self.folder / "inputs", CHANNELS, subsets)
        for model in self.models:
            self._once(f"predict {model.folder}", lambda model=model: self._predict(model, identifiers))
        return identifiers

    def _training_order(self) -> list[Model]:
        return [TEACHER, STUDENT, *(CONTROLS if self.options.controls else ())]

    def _once(self, step: str, action) -> None:
        if self.state.done(step):
            return
        clock = steps.Clock()
        action()
        self.state.finish(step, clock.seconds)

    def _write_data(self) -> None:
        write_dataset(
            self.folder / "raw",
            DATASET,
            name=NAME,
            cases=self.options.cases,
            test_cases=self.options.test_cases,
            spacing=self.options.spacing,
            anatomy=self.options.anatomy,
            seed=self.options.seed,
            progress=True,
        )

    def _preprocess(self) -> None:
        preprocessed = self.folder / "preprocessed" / self.dataset
        shutil.rmtree(preprocessed, ignore_errors=True)
        steps.run(
            ["nnUNetv2_plan_and_preprocess", "-d", str(DATASET), "-c", "3d_fullres", "-np", "2", "-npfp", "2"],
            log=self.folder / "logs" / "preprocessing.log",
            variables=steps.environment(self.folder, threads_for_preprocessing=True, data_workers=None),
            title="plan and preprocess",
            total=3,
            tick=r"^(Fingerprint extraction|Experiment planning|Preprocessing\.\.\.)",
        )
        cases = sorted(path.name[: -len(".nii.gz")] for path in (self.raw / "labelsTr").glob("*.nii.gz"))
        split = {"train": cases[:-VALIDATION_CASES], "val": cases[-VALIDATION_CASES:]}
        (preprocessed / "splits_final.json").write_text(json.dumps([split], indent=4))

    def _configure(self) -> None:
        """The narrow network and short schedule, as ``mstkd configure`` would write them."""
        plans_file = self.folder / "preprocessed" / self.dataset / "nnUNetPlans.json"
        values = {
            **SETTINGS,
            "schedule.iterations": ITERATIONS,
            "schedule.epochs": self.options.student_epochs,
            "teacher.epochs": self.options.teacher_epochs,
            "schedule.seed": self.options.seed,
        }
        assignments = [(*name.split("."), value) for name, value in values.items()]
        plans = configuration.read_plans(plans_file)
        stages = len(plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"])
        features = [*FEATURES, *[FEATURES[-1]] * stages][:stages]
        entry = configuration.derive(plans, "3d_fullres", CONFIGURATION, assignments=assignments, features=features)
        configuration.write_configuration(plans_file, CONFIGURATION, entry, overwrite=True)
        ablations: dict[str, list[tuple[str, str, Any]]] = {
            NO_DISTILLATION: [("distillation", name, 0.0) for name in TERMS],
            EQUAL_BUDGET: [("schedule", "epochs", self.epochs(CONTROLS[0]))],
        }
        for name, changes in ablations.items():
            entry = configuration.derive(configuration.read_plans(plans_file), CONFIGURATION, name, assignments=changes)
            configuration.write_configuration(plans_file, name, entry, overwrite=True)

    def epochs(self, model: Model) -> int:
        """Length of a model's training."""
        teacher, student = self.options.teacher_epochs, self.options.student_epochs
        return {TEACHER: teacher, CONTROLS[0]: teacher + student}.get(model, student)

    def _train(self, model: Model) -> None:
        fold = self.folder / "results" / self.dataset / model.folder / "fold_0"
        started = (fold / "checkpoint_latest.pth").is_file() or (fold / "checkpoint_final.pth").is_file()
        steps.run(
            [
                *("nnUNetv2_train", str(DATASET), model.configuration, "0", "-tr", model.trainer),
                *("-device", self.options.device, *(["--c"] if started else [])),
            ],
            log=self.folder / "logs" / f"train_{model.folder}.log",
            variables=steps.environment(
                self.folder,
                threads_for_preprocessing=True,
                data_workers=0 if self.options.device == "cpu" else None,
            ),
            title=f"train {model.short}",
            total=self.epochs(model),
            tick=r"Epoch time:",
            first=_finished_epochs(fold) if started else 0,
        )

    def _predict(self, model: Model, identifiers: list[str]) -> None:
        out = self.folder / "predictions" / model.folder
        present = len(list(out.glob("*.nii.gz"))) if out.is_dir() else 0
        steps.run(
            [
                *("nnUNetv2_predict", "-i", str(self.folder / "inputs"), "-o", str(out)),
                *("-d", str(DATASET), "-c", model.configuration, "-f", "0", "-tr", model.trainer),
                *("--disable_tta", "-step_size", "1", "-npp", "1", "-nps", "1", "--continue_prediction"),
                *("-device", self.options.device),
            ],
            log=self.folder / "logs" / f"predict_{model.folder}.log",
            variables=steps.environment(self.folder, threads_for_preprocessing=False, data_workers=None),
            title=f"predict {model.short}",
            total=len(identifiers),
            tick=r"^Predicting ",
            first=max(0, present - 1),
        )

    def predictions(self) -> dict[str, Path]:
        """Folder of segmentations by the model's title, in the table's order."""
        return {model.title: self.folder / "predictions" / model.folder for model in self.models}


def _finished_epochs(fold: Path) -> int:
    from nnunetv2_mstkd.nnunet import checkpoints

    for name in ("checkpoint_final.pth", "checkpoint_latest.pth"):
        if (fold / name).is_file():
            return int(checkpoints.read(fold / name)["current_epoch"])
    return 0
