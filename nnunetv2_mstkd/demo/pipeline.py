"""The demo: data, plans, teacher, student, predictions with missing modalities."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.crossval.steps import Step, Training
from nnunetv2_mstkd.demo import steps
from nnunetv2_mstkd.demo.inputs import write_subset_inputs
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import write_json
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet.plans import read_plans
from nnunetv2_mstkd.phantom.dataset import default_workers, write_dataset

DATASET = 901
NAME = "Demo"
PARENT = "3d_fullres"
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

SECONDS_PER_VOXEL_STEP = 4.4e-6
"""Measured time of a teacher's training step on two CPU cores, per voxel of the batch; only for the printed budget."""


@dataclass(frozen=True)
class Options:
    """Everything that the result of a demo depends on."""

    device: str
    epochs: int | None
    cases: int
    test_cases: int
    spacing: float
    seed: int
    anatomy: str
    controls: bool

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("cases", self.cases >= VALIDATION_CASES + 4, f"at least {VALIDATION_CASES + 4} (2 for validation)"),
            ("test_cases", self.test_cases >= 1, "at least 1"),
            ("spacing", 2 <= self.spacing <= 6, "2 to 6 mm"),
            ("epochs", self.epochs is None or self.epochs >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
        ):
            if not fits:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")

    @property
    def student_epochs(self) -> int:
        return STUDENT_EPOCHS if self.epochs is None else self.epochs

    @property
    def teacher_epochs(self) -> int:
        """Epochs of the teacher, in the default proportion to the student's."""
        return max(1, round(self.student_epochs * TEACHER_EPOCHS / STUDENT_EPOCHS))


@dataclass(frozen=True)
class Model:
    """A model of the demo: its name in tables and in progress bars, its trainer and configuration."""

    title: str
    short: str
    trainer: str
    configuration: str


TEACHER = Model("teacher given zeros", "teacher", "MSTKDTeacherTrainer", CONFIGURATION)
STUDENT = Model("MST-KDNet student", "student", "MSTKDTrainer", CONFIGURATION)
CONTROLS = (
    Model("nnU-Net given zeros", "nnU-Net control", "FullModalityTrainer", EQUAL_BUDGET),
    Model("student, no distillation", "no-distillation control", "MSTKDTrainer", NO_DISTILLATION),
)


def choose_device(wanted: str) -> str:
    """``"cuda"`` or ``"cpu"``, for ``"auto"`` the first if there is a GPU."""
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("--device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or leave it out")
    return "cuda" if available and wanted != "cpu" else "cpu"


class Demo:
    """A demo in a folder, which records the options and the seconds of each step in ``demo.json``.

    A folder with anything else is refused, and so is a demo with other options, but for controls, which may be added.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder.resolve()
        self.options = options
        self.raw, self.preprocessed, self.results = (
            self.folder / sub / f"Dataset{DATASET:03d}_{NAME}" for sub in steps.FOLDERS.values()
        )
        self.models = [TEACHER, *(CONTROLS if options.controls else ()), STUDENT]
        self.subsets = modalities.all_subsets(len(CHANNELS))
        self.record = self._open_record()

    def _open_record(self) -> dict[str, Any]:
        file = self.folder / "demo.json"
        options: dict[str, Any] = asdict(self.options) | {"controls": False}
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder} is not empty and holds no demo; choose another folder with --out")
            return {"options": options, "seconds": {}}
        record = json.loads(file.read_text())
        before = record["options"]
        changed = [
            f"{name} {_shown(before.get(name))} (now {_shown(value)})"
            for name, value in options.items()
            if before.get(name) != value
        ]
        if changed:
            raise InputError(
                f"{self.folder} holds a demo with other options: {', '.join(changed)}. Repeat those options to "
                "continue it, or choose another folder with --out"
            )
        return record

    # ---- steps ---------------------------------------------------------------------------------------------------

    def training(self, model: Model) -> Training:
        """A model as nnU-Net names it."""
        return Training(self.results, str(DATASET), model.configuration, model.trainer, device=self.options.device)

    def _command(self, model: Model, name: str, words: Callable[[], list[str]], **others: Any) -> Step:
        return steps.Command(self.training(model), (), name, words=words, **others)

    def preprocess(self) -> Step:
        """Planning and preprocessing the data set."""

        def count() -> int:
            """The last file of each case, and the copies of the labels that follow."""
            return len([*self.preprocessed.glob("*/*.pkl"), *self.preprocessed.glob("gt_segmentations/*.nii.gz")])

        words = f"nnUNetv2_plan_and_preprocess -d {DATASET} -c {PARENT} -np 2 -npfp 2 --clean".split()
        return self._command(TEACHER, "plan and preprocess", lambda: words, total=2 * self.options.cases, count=count)

    def configurations(self) -> list[Step]:
        """Writing the narrow network and short schedule, and what differs for the controls, into the plans."""
        values = {
            **SETTINGS,
            "schedule.iterations": ITERATIONS,
            "schedule.epochs": self.options.student_epochs,
            "teacher.epochs": self.options.teacher_epochs,
            "schedule.seed": self.options.seed,
        }
        found = [self._configure(CONFIGURATION, PARENT, values, FEATURES)]
        if self.options.controls:
            found.append(self._configure(EQUAL_BUDGET, CONFIGURATION, {"schedule.epochs": self.epochs(CONTROLS[0])}))
            without = {f"mstkd.{term}": 0.0 for term in TERMS}
            found.append(self._configure(NO_DISTILLATION, CONFIGURATION, without))
        return found

    def _configure(self, name: str, parent: str, settings: Mapping[str, Any], features: Sequence[int] = ()) -> Step:
        def configurations() -> dict[str, Any]:
            return read_plans(self.preprocessed / "nnUNetPlans.json")["configurations"]

        def words() -> list[str]:
            command = f"mstkd configure -d {DATASET} -c {parent} --name {name}".split()
            command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            if not features:
                return command
            stages = len(configurations()[parent]["architecture"]["arch_kwargs"]["strides"])
            return [*command, "--features", *map(str, [*features, *[features[-1]] * stages][:stages])]

        return self._command(STUDENT, f"configure {name}", words, count=lambda: int(name in configurations()))

    def epochs(self, model: Model) -> int:
        """Length of a model's training."""
        teacher, student = self.options.teacher_epochs, self.options.student_epochs
        return {TEACHER: teacher, CONTROLS[0]: teacher + student}.get(model, student)

    def train(self, model: Model) -> Step:
        """Training a model."""
        return steps.TrainModel(self.training(model), name=f"train {model.short}")

    def predictions(self, model: Model) -> Path:
        """Folder of a model's segmentations."""
        return self.folder / "predictions" / self.training(model).folder.name

    def predict(self, model: Model) -> Step:
        """Predicting all subsets of all test cases with a model and stock ``nnUNetv2_predict``."""
        output = self.predictions(model)
        words = ["nnUNetv2_predict", "-i", str(self.folder / "inputs"), "-o", str(output), *self.words(model).split()]
        words += ["--disable_tta", "-step_size", "1", "-npp", "1", "-nps", "1", "--continue_prediction"]
        return self._command(
            model, f"predict {model.short}", lambda: words, threads=default_workers(),
            total=self.options.test_cases * len(self.subsets), count=lambda: len(list(output.glob("*.nii.gz"))),
        )  # fmt: skip

    def words(self, model: Model) -> str:
        """The options of commands that name a model."""
        return f"-d {DATASET} -c {model.configuration} -f 0 -tr {model.trainer} -device {self.options.device}"

    def run(self) -> list[str]:
        """Run the steps that are not done; return the identifiers ``CASE__SUBSET`` that were predicted."""
        for sub in steps.FOLDERS.values():
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        self._save_record()
        options = self.options
        write_dataset(
            self.folder / "raw", DATASET, name=NAME, cases=options.cases, test_cases=options.test_cases,
            spacing=options.spacing, anatomy=options.anatomy, seed=options.seed, progress=True,
        )  # fmt: skip
        self._run(self.preprocess())
        self._write_split()
        trained = sorted(self.models, key=lambda model: model in CONTROLS)  # the teacher first
        self._run(*self.configurations(), *map(self.train, trained))
        identifiers = write_subset_inputs(self.raw / "imagesTs", self.folder / "inputs", CHANNELS, self.subsets)
        for model in self.models:
            steps.drop_truncated(self.predictions(model))
            self._run(self.predict(model))
        return identifiers

    def _run(self, *todo: Step) -> None:
        for step in todo:
            if not step.done():
                self.record["seconds"][step.key] = round(steps.run_with_bar(step), 1)
                self._save_record()

    def _save_record(self) -> None:
        write_json(self.folder / "demo.json", self.record)

    def _write_split(self) -> None:
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (self.raw / "labelsTr").glob("*.nii.gz"))
        split = {"train": cases[:-VALIDATION_CASES], "val": cases[-VALIDATION_CASES:]}
        write_json(self.preprocessed / "splits_final.json", [split], indent=4)

    # ---- time ----------------------------------------------------------------------------------------------------

    def minutes_left(self) -> dict[str, float]:
        """Estimated minutes on two CPU cores of what is not done."""
        options, models = self.options, len(self.models)
        step = SECONDS_PER_VOXEL_STEP * 2 * 170 * 200 * 160 / options.spacing**3
        teacher = options.teacher_epochs * (ITERATIONS * step + 3)
        student = options.student_epochs * (ITERATIONS * step * 1.5 + 5)
        prediction = 15 + options.test_cases * len(self.subsets) * (0.25 + 2 * step / 5)
        parts: list[tuple[str, list[Step], float]] = [
            ("data and preprocessing", [self.preprocess()], 30 + options.cases),
            ("teacher (all modalities)", [self.train(TEACHER)], teacher + 25),
            ("student (missing modalities)", [self.train(STUDENT)], student + 25),
            ("controls", [self.train(model) for model in self.models if model in CONTROLS], teacher + 2 * student + 50),
            (f"predictions of {models} models", [self.predict(model) for model in self.models], models * prediction),
        ]
        return {name: seconds / 60 for name, todo, seconds in parts if not all(step.done() for step in todo)}

    def announcement(self) -> str:
        """What will be done, where, and how long it may take."""
        left = self.minutes_left()
        where = f"device {self.options.device}; output in {self.folder}\n"
        if not left:
            return f"everything is computed; {where}"
        hardware = "estimated on two CPU cores" + ("; less on a GPU" if self.options.device == "cuda" else "")
        parts = ", ".join(f"{name} {minutes:.0f} min" for name, minutes in left.items())
        return f"time budget ({hardware}): {parts}\nabout {sum(left.values()):.0f} minutes in all; {where}"


def _shown(value: Any) -> Any:
    return "by default" if value is None else value
