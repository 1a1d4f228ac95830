"""What `accuracy.py` trains: a table of rows and, per preset, the data and the budget that all rows share.

A row is trained for one budget of iterations or of hours, that of teacher and student together. Rows with a first stage
(a teacher, or a full-modality model to start from) spend part of it there, the others have all of it for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnunetv2_mstkd.methods.mstkd.settings import TERMS

DATASET = 903
DATASET_NAME = "Accuracy"
PLANS = "nnUNetPlans"
FOLD = 0

PAPER: Mapping[str, Any] = {"mstkd.recipe": "paper", "schedule.initial_lr": None}
"""With the recipe's own optimiser, Adam, goes its own rate. Its teacher is trained in the same steps."""

STRONG: Mapping[str, Any] = {
    **{f"mstkd.{name}": weight for name, weight in zip(TERMS, (1.0, 0.2, 10.0, 1.0, 1.0, 2e-4), strict=True)},
    "distillation.where": "everywhere", "distillation.fade": 0.0, "schedule.optimizer": "adam",
    "schedule.initial_lr": None,
}  # fmt: skip
"""Relative terms whose gradient rivals the segmentation loss's, which were called "paper" before 2026-11-28."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the comparison.

    Attributes
    ----------
    name:
        part of the names of configurations and folders.
    title:
        what tables call it.
    kind:
        ``floor``, ``control`` (one of those that distillation must beat), ``method``, ``ablation`` or ``upper bound``.
    trainer:
        class of the trainer.
    first:
        trainer of the first stage; None: there is none.
    starts_from_first:
        load the weights of the first stage where the trainer would not do it by itself.
    settings:
        ``section.key`` to value, beside those of the preset.
    variant:
        name of settings of both stages in :data:`VARIANTS`.
    subset:
        the only one that it is evaluated on; None: all.
    terms:
        whether it has weighted terms beside the segmentation loss.
    unlabelled:
        whether it says something only beside unlabelled cases; it has to be named.
    """

    name: str
    title: str
    kind: str
    trainer: str
    first: str | None = None
    starts_from_first: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    subset: str | None = None
    terms: bool = False
    unlabelled: bool = False

    def first_stage(self, seed: int) -> str:
        """The configuration of its teacher or of the model that it starts from, and the parent of its own."""
        return first_stage(seed, self.variant)

    def epochs(self, preset: Preset) -> int:
        """Epochs after the first stage. With a budget of hours: those of the preset until the time per step is known.

        Patches grow and weights of terms change in the course of a training, so steps are timed in one of full length.
        """
        if preset.hours is None or self.name not in preset.step_seconds:
            return preset.student_epochs if self.first else preset.first_epochs + preset.student_epochs
        left = preset.hours * 3600
        if self.first:
            left -= preset.first_epochs * preset.iterations * preset.step_seconds[self.first]
        return max(1, round(left / (preset.iterations * preset.step_seconds[self.name])))

    def first_epochs(self, preset: Preset) -> int:
        """Of the first stage; 0 without one."""
        return preset.first_epochs if self.first else 0

    def iterations(self, preset: Preset) -> int:
        """Training steps of both stages together."""
        return (self.first_epochs(preset) + self.epochs(preset)) * preset.iterations

    def configuration(self, seed: int) -> str:
        return f"{self.name}_s{seed}"

    def assignments(self, preset: Preset, seed: int) -> list[tuple[str, str, Any]]:
        """Settings that differ from those of the first stage, as ``mstkd configure`` takes them."""
        settings: dict[str, Any] = {"schedule.epochs": self.epochs(preset)}
        if self.starts_from_first:
            dataset, folder = f"Dataset{DATASET:03d}_{DATASET_NAME}", f"{self.first}__{PLANS}__{self.first_stage(seed)}"
            settings["schedule.init_from"] = f"{dataset}/{folder}/fold_{FOLD}/checkpoint_final.pth"
        elif self.first:
            settings["teacher.configuration"] = self.first_stage(seed)
        return _split({**settings, **self.settings})


VARIANTS: Mapping[str, Mapping[str, Any]] = {"": {}, "main": {"network.placement": "main"}}
"""Settings that teacher and student share."""


def first_stage(seed: int, variant: str = "") -> str:
    """The configuration of teachers and of other models to start from, and the parent of all rows' configurations."""
    return f"first{variant and '-'}{variant}_s{seed}"


def first_assignments(preset: Preset, seed: int, variant: str = "") -> list[tuple[str, str, Any]]:
    """Settings of the first stage."""
    return _split(
        {
            "schedule.iterations": preset.iterations,
            "schedule.validation_iterations": preset.validation_iterations,
            "schedule.epochs": preset.first_epochs,
            "schedule.seed": seed,
            **preset.settings,
            **VARIANTS[variant],
        }
    )


def _split(settings: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    return [(*key.split("."), value) for key, value in settings.items()]  # type: ignore[misc]


def _dedicated(subset: str) -> Row:
    name = subset.replace("+", "-").lower()
    return Row(
        name=f"dedicated-{name}",
        title=f"nnU-Net trained on {subset} alone",
        kind="upper bound",
        trainer="ModalityDropoutTrainer",
        settings={"sampler.kind": "fixed", "sampler.subsets": [subset]},
        subset=subset,
    )


def _without(*terms: str) -> dict[str, float]:
    return {f"mstkd.{name}": 0.0 for name in terms}


def _mstkd(
    name: str, title: str, kind: str, settings: Mapping[str, Any], *, terms: bool = True, variant: str = ""
) -> Row:
    return Row(
        name=name, title=title, kind=kind, trainer="MSTKDTrainer", first="MSTKDTeacherTrainer", settings=settings,
        terms=terms, variant=variant,
    )  # fmt: skip


def _kd(name: str, title: str, settings: Mapping[str, Any]) -> Row:
    return Row(
        name=name, title=title, kind="method", trainer="KDTrainer", first="KDTeacherTrainer", settings=settings,
        terms=True,
    )  # fmt: skip


def _self(name: str, title: str, settings: Mapping[str, Any]) -> Row:
    return Row(
        name=name, title=title, kind="method", trainer="SelfDistillationTrainer", settings=settings, terms=True
    )  # fmt: skip


STUDENT = "mstkd"
FLOOR = "full"
CHEAP_CONTROL = "dropout-warm"
"""The control whose hours are compared: nearly the best, at the lowest cost per step."""
LONGER = {"short": "longer"}
"""By preset, the one with the same control and more steps, between which the control is interpolated at other hours."""

WARM = Row(
    name=CHEAP_CONTROL,
    title="ModalityDropoutTrainer, warm start",
    kind="control",
    trainer="ModalityDropoutTrainer",
    first="KDTeacherTrainer",
    starts_from_first=True,
)

ROWS: tuple[Row, ...] = (
    Row(name=FLOOR, title="FullModalityTrainer, given zeros", kind="floor", trainer="FullModalityTrainer"),
    Row(name="dropout", title="ModalityDropoutTrainer", kind="control", trainer="ModalityDropoutTrainer"),
    Row(
        name="dropout-growing",
        title="ModalityDropoutTrainer, growing patches",
        kind="method",
        trainer="ModalityDropoutTrainer",
        settings={"schedule.patch_phases": 4},
    ),
    WARM,
    _mstkd("mstkd-zero", "MSTKDTrainer, no distillation, warm start", "control", _without(*TERMS), terms=False),
    _mstkd(STUDENT, "MSTKDTrainer", "method", {}),
    _mstkd("mstkd-separate", "MSTKDTrainer, KL of separate regions", "method", {"mstkd.regions": "separate"}),
    _mstkd("mstkd-main-zero", "MSTKDTrainer, transformer on the main path, no distillation", "method",
           _without(*TERMS), terms=False, variant="main"),
    _mstkd("mstkd-main", "MSTKDTrainer, transformer on the main path", "method", {}, variant="main"),
    _mstkd("mstkd-main-ms-tkd", "MSTKDTrainer, transformer on the main path, MS-TKD alone", "method",
           _without("discrepancy", "kl", "style", "adversarial"), variant="main"),
    _mstkd("mstkd-strong", "MSTKDTrainer, strong relative terms", "method", STRONG),
    Row(name="mstkd-paper", title='MSTKDTrainer, recipe "paper"', kind="method", trainer="MSTKDTrainer",
        settings=PAPER, terms=True),
    _mstkd("mstkd-no-ms-tkd", "MSTKDTrainer w/o MS-TKD", "ablation", _without("evd", "maps")),
    _mstkd("mstkd-no-dmld", "MSTKDTrainer w/o DMLD", "ablation", _without("discrepancy", "kl")),
    _mstkd("mstkd-no-gsme", "MSTKDTrainer w/o GSME", "ablation", _without("style", "adversarial")),
    _mstkd("mstkd-cold", "MSTKDTrainer w/o warm start", "ablation", {"teacher.warm_start": False}),
    Row(
        name="adamm",
        title="AdaMMTrainer",
        kind="method",
        trainer="AdaMMTrainer",
        first="AdaMMTeacherTrainer",
        terms=True,
    ),
    _kd("kd", "KDTrainer", {}),
    _kd("kd-every-step", "KDTrainer, a teacher in every step", {"distillation.every": 1}),
    _kd("kd-fading", "KDTrainer, fading over the second half", {"distillation.fade": 0.5}),
    replace(_kd("kd-labelled", "KDTrainer, labelled cases alone", {"unlabelled.share": 0}), unlabelled=True),
    replace(
        _mstkd("mstkd-labelled", "MSTKDTrainer, labelled cases alone", "method", {"unlabelled.share": 0}),
        unlabelled=True,
    ),
    replace(
        WARM,
        name="dropout-self",
        title="ModalityDropoutTrainer, warm start, own pseudo-labels",
        kind="method",
        settings={"unlabelled.share": 0.5},
        unlabelled=True,
    ),
    _self("self", "SelfDistillationTrainer", {}),
    _self("self-growing", "SelfDistillationTrainer, growing patches", {"schedule.patch_phases": 4}),
    _self("self-average", "SelfDistillationTrainer, moving average", {"self_distillation.decay": 0.99}),
    Row(name="conditioned", title="ModalityConditionedTrainer", kind="method", trainer="ModalityConditionedTrainer"),
    Row(name="medmap", title="MedMAPTrainer", kind="method", trainer="MedMAPTrainer", terms=True),
    Row(name="mmformer", title="MMFormerTrainer", kind="method", trainer="MMFormerTrainer", terms=True),
    Row(name="rfnet", title="RFNetTrainer", kind="method", trainer="RFNetTrainer", terms=True),
    Row(name="smml", title="SMMLTrainer", kind="method", trainer="SMMLTrainer", terms=True),
    _dedicated("FLAIR"),
    _dedicated("T1ce"),
    _dedicated("T1+T2"),
)  # fmt: skip
"""One entry per model. Another trainer is another line; ``first`` names the trainer of its teacher, if it has one."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Data, network and budget that all rows share.

    Attributes
    ----------
    spacing:
        voxel edge of the phantom in mm.
    training_cases, validation_cases, test_cases:
        numbers; the validation cases are nnU-Net's own and decide nothing, the results are those of the test cases.
    features:
        channels per stage, the last one repeated for further stages; None: nnU-Net's own.
    batch_size:
        None: nnU-Net's own.
    first_epochs, student_epochs, iterations, validation_iterations:
        epochs of the first stage and of what follows, steps per epoch.
    settings:
        ``section.key`` to value, for all rows.
    device:
        where it is meant to run.
    evaluation:
        options of ``mstkd evaluate``.
    seconds_per_step:
        of plain nnU-Net on ``device``, for the estimated budget only.
    where:
        what that estimate holds for.
    bfloat16:
        train in bfloat16 on a CPU; on CUDA nnU-Net's own mixed precision holds.
    configuration:
        of nnU-Net.
    target_spacing:
        in mm; None: nnU-Net's own.
    data_seed:
        of the phantom, or of the division of a data set into parts.
    label_noise:
        standard deviation of the boundaries of training labels in mm, see ``label_noise.py``.
    hours:
        of both stages together, in place of ``student_epochs``; a CPU's are those of the process.
    step_seconds:
        time of a training step by row and by trainer of the first stage, which ``hours`` are divided by.
    """

    spacing: float
    training_cases: int
    validation_cases: int
    test_cases: int
    features: tuple[int, ...] | None
    batch_size: int | None
    first_epochs: int
    student_epochs: int
    iterations: int
    validation_iterations: int
    device: str
    evaluation: tuple[str, ...]
    seconds_per_step: float
    where: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "hard"
    anatomy: str = "procedural"
    data_seed: int = 0
    bfloat16: bool = False
    configuration: str = "3d_fullres"
    target_spacing: tuple[float, float, float] | None = None
    label_noise: float = 0.0
    hours: float | None = None
    step_seconds: Mapping[str, float] = field(default_factory=dict)

    def stages(self, planned: int) -> list[int] | None:
        """Widths for a plan of so many stages."""
        return None if self.features is None else [*self.features, *[self.features[-1]] * planned][:planned]


ADAMW: Mapping[str, Any] = {"schedule.optimizer": "adamw", "schedule.initial_lr": 1e-3}

SHORT = Preset(
    spacing=5.0, training_cases=60, validation_cases=2, test_cases=24, features=(12, 24, 48, 96), batch_size=2,
    first_epochs=12, student_epochs=12, iterations=50, validation_iterations=4, settings=ADAMW, device="cpu",
    evaluation=("--disable_tta",), seconds_per_step=0.18, where="one CPU core that knows bfloat16",
    bfloat16=True,
)  # fmt: skip

SLICES = Preset(
    spacing=4.0, training_cases=60, validation_cases=4, test_cases=24, features=(8, 16, 32, 48, 64), batch_size=8,
    first_epochs=40, student_epochs=80, iterations=50, validation_iterations=4, device="cpu",
    settings={**ADAMW, "input.normalization": "plans", "schedule.save_every": 5},
    evaluation=("--disable_tta", "--stack", "7", "--strips", "0", "-npp", "0", "-nps", "0"), bfloat16=True,
    seconds_per_step=0.06, where="one CPU core that knows bfloat16", configuration="2d", target_spacing=(5, 4, 4),
)  # fmt: skip

PRESETS: Mapping[str, Preset] = {
    # for a test of the program: nothing converges
    "tiny": Preset(
        spacing=6.0, training_cases=4, validation_cases=2, test_cases=3, features=(8, 16, 24), batch_size=2,
        first_epochs=3, student_epochs=3, iterations=4, validation_iterations=1, settings=ADAMW, device="cpu",
        evaluation=("--disable_tta", "-npp", "0", "-nps", "0", "--strips", "0"),
        seconds_per_step=0.5, where="one CPU core",
    ),
    # whole-brain patches: at 2 mm and with small patches nothing converges in the time of a CPU
    "cpu": Preset(
        spacing=4.0, training_cases=60, validation_cases=2, test_cases=24, features=(12, 24, 48, 96), batch_size=2,
        first_epochs=18, student_epochs=18, iterations=50, validation_iterations=8, settings=ADAMW, device="cpu",
        evaluation=("--disable_tta",), seconds_per_step=0.7, where="two CPU cores, as the demo's steps were measured",
    ),
    "short": SHORT,
    # twice the steps, and the teacher three times its own
    "longer": replace(SHORT, first_epochs=3 * SHORT.first_epochs),
    # slices and small networks, so that a training of minutes comes close to where accuracy no longer rises
    "slices": SLICES,
    # the same in 3-D, for real patients, and in float32
    "volumes": replace(
        SLICES, spacing=5.0, features=(12, 24, 48, 96), batch_size=2, first_epochs=12, student_epochs=12,
        bfloat16=False, seconds_per_step=0.3, where="one CPU core", configuration="3d_fullres",
        target_spacing=(7.5, 6.5, 6.5),
    ),
    "full": Preset(
        spacing=2.0, training_cases=60, validation_cases=4, test_cases=24, features=None, batch_size=None,
        first_epochs=100, student_epochs=100, iterations=250, validation_iterations=20, device="cuda",
        evaluation=(), seconds_per_step=0.08, where="one GPU, guessed and not measured",
    ),
}  # fmt: skip

STEP_COST: Mapping[str, float] = {
    "MSTKDTrainer": 1.6,
    "AdaMMTrainer": 1.55,
    "MedMAPTrainer": 1.15,
    "SMMLTrainer": 2.1,
    "MMFormerTrainer": 3.4,
    "RFNetTrainer": 3.7,
    "MSTKDTeacherTrainer": 1.07,
}
"""A training step over FullModalityTrainer's, from README's table; for the estimate only. Others: 1."""


def chosen_rows(names: Iterable[str] | None) -> list[Row]:
    """The rows of these names, in the table's order; None: all but those for unlabelled cases.

    Raises
    ------
    ValueError
        for a name that the table does not have.
    """
    known = [row.name for row in ROWS]
    wanted = [row.name for row in ROWS if not row.unlabelled] if names is None else list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"no row {unknown[0]!r}; there are {', '.join(known)}")
    return [row for row in ROWS if row.name in wanted]


def estimated_hours(rows: Sequence[Row], preset: Preset, seeds: Sequence[int]) -> dict[str, float]:
    """Hours by row, first stages that several rows share once and by their own name, and evaluation as ``evaluate``."""
    hours: dict[str, float] = {}
    step = preset.seconds_per_step / 3600
    for row in rows:
        if row.first:
            cost = STEP_COST.get(row.first, 1.0)
            hours[row.first] = len(seeds) * preset.first_epochs * preset.iterations * step * cost
        cost = STEP_COST.get(row.trainer, 1.0)
        hours[row.name] = len(seeds) * row.epochs(preset) * preset.iterations * step * cost
    # 15 subsets, each a third of a step's time per window; start and metrics cost about 2 s per case
    number = sum(1 if row.subset else 15 for row in rows) * len(seeds) * preset.test_cases
    hours["evaluate"] = (
        number * preset.seconds_per_step / 3 / 3600 + len(rows) * len(seeds) * preset.test_cases * 2 / 3600
    )
    return hours
