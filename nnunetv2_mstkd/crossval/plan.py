"""Which steps a cross-validation has, from the user's request and nnU-Net's plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.crossval.steps import Compare, Evaluate, Step, Train, Training
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.folders import dataset_argument, find_dataset_folder, nnunet_folder
from nnunetv2_mstkd.nnunet.plans import BLOCK, inherited, read_plans
from nnunetv2_mstkd.nnunet.splits import number_of_folds
from nnunetv2_mstkd.nnunet.trainers import find_trainer


def plan_steps(
    dataset: str,
    configuration: str,
    trainers: Sequence[str],
    folds: Sequence[int] | None = None,
    *,
    plans_name: str = "nnUNetPlans",
    device: str = "cuda",
    gpus: int = 1,
    evaluation: bool = True,
    evaluation_options: Sequence[str] = (),
) -> list[Step]:
    """The steps of a cross-validation, after the checks that nnU-Net would only make in the job.

    Parameters
    ----------
    dataset
        Number or name.
    configuration, plans_name
        nnU-Net's configuration and plans identifier.
    trainers
        Their models are compared if there are several.
    folds
        Default: all.
    device, gpus
        Device of all steps, and number of GPUs of one training.
    evaluation, evaluation_options
        Whether to evaluate and compare the models, and further options of ``mstkd evaluate``.

    Raises
    ------
    MissingFileError, InputError
        If the data set, plans, configuration, a fold or a trainer does not exist, or a batch has fewer samples than
        GPUs.
    """
    preprocessed = find_dataset_folder("nnUNet_preprocessed", dataset)
    existing = number_of_folds(preprocessed)
    folds = list(range(existing)) if folds is None else sorted(folds)
    for what, values in (("-tr", trainers), ("--folds", folds)):
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise InputError(f"{what} names {twice[0]} twice")
    if folds[0] < 0:
        raise InputError(f"--folds {folds[0]}: folds are numbers from 0")
    plans = read_plans(preprocessed / f"{plans_name}.json")
    if configuration not in plans["configurations"]:
        raise InputError(
            f"{preprocessed / plans_name}.json has no configuration {configuration!r}; it has "
            f"{', '.join(plans['configurations'])}"
        )
    if folds[-1] >= existing:
        where = "splits_final.json has" if (preprocessed / "splits_final.json").is_file() else "nnU-Net makes"
        raise InputError(f"fold {folds[-1]} does not exist: {where} the folds 0 to {existing - 1}")
    batch = inherited(plans, configuration, "batch_size")
    if batch is not None and gpus > int(batch):
        raise InputError(
            f"--num-gpus {gpus}: a batch of {configuration} has {batch} samples, and each GPU needs one; take at most "
            f"{batch} GPUs"
        )
    results = nnunet_folder("nnUNet_results") / preprocessed.name
    named = dataset_argument(preprocessed.name)
    models = [Training(results, named, configuration, trainer, plans_name, device, gpus) for trainer in trainers]
    options = tuple(evaluation_options)
    return make_steps(preprocessed, models, folds, plans, evaluation_options=options, evaluation=evaluation)


def make_steps(
    preprocessed: Path,
    models: Sequence[Training],
    folds: Sequence[int],
    plans: Mapping[str, Any],
    *,
    evaluation_options: tuple[str, ...] = (),
    evaluation: bool = True,
) -> list[Step]:
    """All steps, each after those that it needs.

    For each fold the teacher if the trainer has one, then the trainer; each fold's evaluation; per model all folds
    together; the comparison if there are several models.
    """
    steps: dict[str, Step] = {}
    pooled = []
    measuring: dict[str, Any] = {"splits": preprocessed / "splits_final.json", "options": evaluation_options}
    for model in models:
        last = []  # what the pooled evaluation waits for
        for fold in folds:
            key = _add_training(steps, model, plans, fold)
            if evaluation and len(folds) > 1:
                step = Evaluate(model, (key,), (fold,), **measuring)
                steps[step.key], key = step, step.key
            last.append(key)
        if evaluation:
            pool = Evaluate(model, tuple(last), tuple(folds), pooled=True, **measuring)
            steps[pool.key] = pool
            pooled.append(pool.key)
    if len(pooled) > 1:
        compare = Compare(models[0], tuple(pooled), models=tuple(models))
        steps[compare.key] = compare
    return list(steps.values())


def _add_training(
    steps: dict[str, Step], model: Training, plans: Mapping[str, Any], fold: int, above: tuple[Training, ...] = ()
) -> str:
    """Add a training after those that it needs, and return its key; ``above`` are those that need it."""
    first = [each for each in needed_by(model, plans, fold) if each not in above]
    needs = tuple(_add_training(steps, each, plans, fold, (*above, model)) for each in first)
    step = Train(model, needs, fold=fold)
    steps.setdefault(step.key, step)
    return step.key


def needed_by(model: Training, plans: Mapping[str, Any], fold: int) -> list[Training]:
    """The models that must be trained before `model`: its teacher and the one that it starts from, if it has them."""
    from nnunetv2_mstkd.training.base import SettingsTrainer
    from nnunetv2_mstkd.training.distillation import DistillationTrainer
    from nnunetv2_mstkd.training.finished import configuration_with
    from nnunetv2_mstkd.training.settings import ScheduleSettings, Settings, TeacherSettings

    block = inherited(plans, model.configuration, BLOCK)
    settings = Settings.read(block, [TeacherSettings, ScheduleSettings], strict=False)
    source, teacher = settings[ScheduleSettings].starts_from(model.trainer), settings[TeacherSettings]
    trainer = find_trainer(model.trainer)
    wanted: list[Training] = []

    def want(name: str, configuration: str | None, same: bool = False) -> None:
        configuration = configuration or configuration_with(
            model.results, trainer=name, plans=plans, configuration=model.configuration, fold=fold, same=same
        )
        wanted.append(dataclasses.replace(model, trainer=name, configuration=configuration))

    if source and not ScheduleSettings.is_file(source) and issubclass(trainer, SettingsTrainer):
        want(source, None, same=True)
    if issubclass(trainer, DistillationTrainer) and not teacher.joint:
        want(trainer.teacher_trainer.__name__, teacher.configuration)
    return list(dict.fromkeys(wanted))
