"""The demo: data, plans, two models, an evaluation of each on every subset of the modalities, and their comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.crossval.steps import Training
from nnunetv2_mstkd.demo import steps
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import read_json, write_json
from nnunetv2_mstkd.inference.evaluation_files import CASES, FOLDER, REPORT
from nnunetv2_mstkd.nnunet.plans import read_plans
from nnunetv2_mstkd.nnunet.trainers import find_trainer
from nnunetv2_mstkd.phantom.dataset import write_dataset
from nnunetv2_mstkd.processes import default_workers

DATASET = 901
NAME = "Demo"
PARENT = "3d_fullres"
CONFIGURATION = "demo"
VALIDATION_CASES = 2
DISCLAIMER = "synthetic phantom: these numbers say nothing about clinical performance"

FEATURES = (12, 24, 48, 96)
ITERATIONS = 50
EPOCHS = 11
SETTINGS: dict[str, Any] = {
    "schedule.optimizer": "adamw",
    "schedule.initial_lr": 1e-3,
    "schedule.validation_iterations": 4,
}
"""Widths, length and rates with which two idle CPU cores need about 6 minutes; see documentation/decisions.md."""

SECONDS_PER_VOXEL_STEP = 2.1e-6
"""Measured time of a training step on two CPU cores, per voxel of the batch: the estimate until an epoch is timed."""
DISTILLING = 1.7
"""A distilling student's step, in those of a plain training."""


@dataclass(frozen=True)
class Options:
    """Everything that the result of a demo depends on."""

    device: str
    epochs: int
    cases: int
    test_cases: int
    spacing: float
    seed: int
    anatomy: str
    trainers: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("cases", self.cases >= VALIDATION_CASES + 4, f"at least {VALIDATION_CASES + 4} (2 for validation)"),
            ("test_cases", self.test_cases >= 1, "at least 1"),
            ("spacing", 2 <= self.spacing <= 6, "2 to 6 mm"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
        ):
            if not fits:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")

    @classmethod
    def read(cls, record: dict[str, Any]) -> Options:
        """The options in a demo's record, ``demo.json``."""
        try:
            return cls(**{**record["options"], "trainers": tuple(record["options"]["trainers"])})
        except (KeyError, TypeError) as error:
            raise InputError("its demo.json is that of another version; choose another folder with --out") from error


@dataclass(frozen=True)
class Model:
    """A model of the demo: its trainer, and its name in tables."""

    trainer: str
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.trainer)


def teacher_of(model: Model) -> Model | None:
    """The teacher of a distilled student; None for other models."""
    found = getattr(find_trainer(model.trainer), "teacher_trainer", None)
    return None if found is None else Model(found.__name__)


def check_trainers(names: Sequence[str]) -> None:
    """Refuse trainers that would not train as the demo's settings say, such as nnU-Net's own: 1000 epochs of 250."""
    from nnunetv2_mstkd.training.base import SettingsTrainer  # imports torch and nnU-Net

    for name in names:
        if not issubclass(find_trainer(name), SettingsTrainer):
            raise InputError(
                f"--trainers {name} does not read the demo's settings, such as the number of epochs; the demo always "
                f"trains {BASELINE.trainer}, which is nnU-Net's trainer with these settings"
            )


BASELINE = Model("FullModalityTrainer", "nnU-Net given zeros")
RECOMMENDED = "ModalityDropoutTrainer"


def choose_device(wanted: str) -> str:
    """``"cuda"`` or ``"cpu"``, for ``"auto"`` the first if there is a GPU."""
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("--device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or leave it out")
    return "cuda" if available and wanted != "cpu" else "cpu"


class Demo:
    """A demo in a folder, which records the options and the seconds of each step in ``demo.json``.

    A folder with anything else is refused, and so is a demo with other options, but for trainers, which may be added.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder.resolve()
        self.options = options
        self.raw, self.preprocessed, self.results = (
            self.folder / sub / f"Dataset{DATASET:03d}_{NAME}" for sub in steps.FOLDERS.values()
        )
        check_trainers(options.trainers)
        names = [name for name in (RECOMMENDED, *options.trainers) if name != BASELINE.trainer]
        self.models = [BASELINE, *map(Model, dict.fromkeys(names))]
        self.teachers = list(dict.fromkeys(filter(None, map(teacher_of, self.models))))
        self.record = self._open_record()
        self.clock = steps.Clock()

    def _open_record(self) -> dict[str, Any]:
        file = self.folder / "demo.json"
        options: dict[str, Any] = asdict(self.options) | {"trainers": []}
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder} is not empty and holds no demo; choose another folder with --out")
            return {"options": options, "seconds": {}}
        record = read_json(file)
        before = asdict(Options.read(record)) | {"trainers": []}
        changed = [f"{name} {before[name]} (now {value})" for name, value in options.items() if before[name] != value]
        if changed:
            raise InputError(
                f"{self.folder} holds a demo with other options: {', '.join(changed)}. Repeat those options to "
                "continue it, or choose another folder with --out"
            )
        return record

    # ---- steps ---------------------------------------------------------------------------------------------------

    def training(self, model: Model) -> Training:
        """A model as nnU-Net names it."""
        return Training(self.results, str(DATASET), CONFIGURATION, model.trainer, device=self.options.device)

    def _command(self, model: Model, name: str, words: Callable[[], list[str]], **others: Any) -> steps.DemoStep:
        return steps.Command(self.training(model), (), name, words=words, **others)

    def preprocess(self) -> steps.DemoStep:
        """Planning and preprocessing the data set."""

        def count() -> int:
            """The last file of each case, and the copies of the labels that follow."""
            return len(
                [
                    *self.preprocessed.glob(f"nnUNetPlans_{PARENT}/*.pkl"),
                    *self.preprocessed.glob("gt_segmentations/*.nii.gz"),
                ]
            )

        words = f"nnUNetv2_plan_and_preprocess -d {DATASET} -c {PARENT} -np 2 -npfp 2 --clean".split()
        return self._command(
            BASELINE, "plan and preprocess", lambda: words, total=2 * self.options.cases, count=count,
            seconds=20 + self.options.cases / 5,
        )  # fmt: skip

    def configure(self) -> steps.DemoStep:
        """Writing the narrow network and short schedule into the plans."""
        epochs = self.options.epochs
        settings = {
            **SETTINGS,
            "schedule.iterations": ITERATIONS,
            "schedule.epochs": epochs,
            "teacher.epochs": epochs,
            "schedule.seed": self.options.seed,
            "schedule.init_from": BASELINE.trainer,
        }

        def configurations() -> dict[str, Any]:
            file = self.preprocessed / "nnUNetPlans.json"
            return read_plans(file)["configurations"] if file.is_file() else {}

        def words() -> list[str]:
            stages = len(configurations()[PARENT]["architecture"]["arch_kwargs"]["strides"])
            features = [*FEATURES, *[FEATURES[-1]] * stages][:stages]
            command = f"mstkd configure -d {DATASET} -c {PARENT} --name {CONFIGURATION} --features".split()
            command += map(str, features)
            return command + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

        return self._command(
            BASELINE, "configure", words, count=lambda: int(CONFIGURATION in configurations()), seconds=6
        )

    def train(self, model: Model) -> steps.DemoStep:
        """Training a model."""
        step = SECONDS_PER_VOXEL_STEP * 2 * 170 * 200 * 160 / self.options.spacing**3
        step *= DISTILLING if teacher_of(model) else 1
        seconds = steps.START + self.options.epochs * (ITERATIONS * step + 2)
        return steps.TrainModel(self.training(model), name=f"train {model.trainer}", seconds=seconds)

    def evaluation(self, model: Model) -> Path:
        """Folder of a model's evaluation."""
        return self.training(model).folder / FOLDER

    def evaluate(self, model: Model) -> steps.DemoStep:
        """Segmenting the test cases from every subset of the modalities, and the report."""
        output, cases = self.evaluation(model), self.options.test_cases

        def words() -> list[str]:
            command = ["mstkd", "evaluate", *self.words(model).split(), "--name", model.title, "--metrics", "dice"]
            command += ["-i", str(self.raw / "imagesTs"), "-l", str(self.raw / "labelsTs"), "-o", str(output)]
            return [*command, "--disable_tta", "--disable_progress_bar"]

        def count() -> int:
            return len(list(output.glob(f"{CASES}/*/*.json"))) + (output / REPORT).is_file()

        seconds = steps.START + 1.5 * cases * (5 / self.options.spacing) ** 3 / default_workers()
        return self._command(
            model, f"evaluate {model.trainer}", words, threads=default_workers(), total=cases + 1, count=count,
            seconds=seconds,
        )  # fmt: skip

    def words(self, model: Model) -> str:
        """The options of commands that name a model."""
        return f"-d {DATASET} -c {CONFIGURATION} -f 0 -tr {model.trainer} -device {self.options.device}"

    def commands(self) -> list[steps.DemoStep]:
        """All commands of the demo, in order."""
        trained = dict.fromkeys([*self.models[:2], *self.teachers, *self.models[2:]])
        return [
            self.preprocess(),
            self.configure(),
            *map(self.train, trained),
            *map(self.evaluate, self.models),
        ]

    def run(self) -> None:
        """Run the steps that are not done."""
        for sub in steps.FOLDERS.values():
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        self._save_record()
        options = self.options
        write_dataset(
            self.folder / "raw", DATASET, name=NAME, cases=options.cases, test_cases=options.test_cases,
            spacing=options.spacing, anatomy=options.anatomy, seed=options.seed, progress=True,
        )  # fmt: skip
        todo = self.commands()
        for number, step in enumerate(todo):
            if not step.done():
                later = sum(each.seconds for each in todo[number + 1 :] if not each.done())
                self._run(step, later)
            if number == 0:
                self._write_split()

    def _run(self, step: steps.DemoStep, later: float) -> None:
        """Run a step and add its time, an interrupted one's too, to that of earlier calls."""
        start, before = time.monotonic(), self.record["seconds"].get(step.key, 0.0)
        try:
            steps.run_with_bar(step, self.clock, later)
        finally:
            self.record["seconds"][step.key] = round(before + time.monotonic() - start, 1)
            self._save_record()

    def _save_record(self) -> None:
        write_json(self.folder / "demo.json", self.record)

    def _write_split(self) -> None:
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (self.raw / "labelsTr").glob("*.nii.gz"))
        split = {"train": cases[:-VALIDATION_CASES], "val": cases[-VALIDATION_CASES:]}
        write_json(self.preprocessed / "splits_final.json", [split], indent=4)

    def continued(self) -> str:
        """What the comparison does not show, as a sentence."""
        names = " and ".join(model.title for model in self.models[1:])
        return (
            f"{names} continued from the weights of {self.models[0].title}; counting the steps before, the training "
            "was at least twice as long"
        )

    def hours(self) -> dict[str, float]:
        """Hours of training of each model, with those of the models that it needs."""
        seconds = self.record["seconds"]

        def of(model: Model) -> float:
            return float(seconds.get(self.train(model).key, 0.0)) / 3600

        return {model.title: sum(map(of, {BASELINE, model, teacher_of(model) or BASELINE})) for model in self.models}

    # ---- time ----------------------------------------------------------------------------------------------------

    def announcement(self) -> str:
        """What will be done, where, and how long it may take."""
        left = [step for step in self.commands() if not step.done()]
        where = f"device {self.options.device}; output in {self.folder}\n"
        if not left:
            return f"everything is computed; {where}"
        names = ", ".join(model.title for model in self.models)
        minutes = math.ceil(sum(step.seconds for step in left) / 60)
        guess = f"about {minutes} minutes on two CPU cores{'; less on a GPU' if self.options.device == 'cuda' else ''}"
        return f"models: {names}; {guess}, timed anew in the first epochs\n{where}"
