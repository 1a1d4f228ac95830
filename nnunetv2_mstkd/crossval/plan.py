"""Which steps a cross-validation has, from the user's request and nnU-Net's plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.crossval.steps import Compare, Evaluate, Step, Train, Training
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.folders import dataset_number, find_dataset_folder, nnunet_folder
from nnunetv2_mstkd.nnunet.plans import BLOCK, inherited, read_plans
from nnunetv2_mstkd.nnunet.splits import number_of_folds
from nnunetv2_mstkd.nnunet.trainers import find_trainer


@dataclass(frozen=True)
class Request:
    """What to cross-validate.

    Attributes
    ----------
    dataset
        Number or name of the data set.
    configuration, plans
        nnU-Net's configuration and plans identifier.
    trainers
        Trainers, which are compared if there are several.
    folds
        Folds; None for all.
    device
        Device of all steps.
    gpus
        Number of GPUs of one training.
    evaluation
        Whether to evaluate and compare the models.
    evaluation_options
        Further options of ``mstkd evaluate``.
    """

    dataset: str
    configuration: str
    trainers: Sequence[str]
    folds: Sequence[int] | None = None
    plans: str = "nnUNetPlans"
    device: str = "cuda"
    gpus: int = 1
    evaluation: bool = True
    evaluation_options: Sequence[str] = ()


def plan_steps(request: Request) -> list[Step]:
    """The steps of a cross-validation, after the checks that nnU-Net would only make in the job.

    Raises
    ------
    FileNotFoundError, ValueError
        If the data set, plans, configuration, a fold or a trainer does not exist, or a batch has fewer samples than
        GPUs.
    """
    preprocessed = find_dataset_folder("nnUNet_preprocessed", request.dataset)
    existing = number_of_folds(preprocessed)
    folds = list(range(existing)) if request.folds is None else sorted(request.folds)
    for what, values in (("--trainer", request.trainers), ("--folds", folds)):
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise InputError(f"{what} names {twice[0]} twice")
    if folds[0] < 0:
        raise InputError(f"--folds {folds[0]}: folds are numbers from 0")
    plans = read_plans(preprocessed / f"{request.plans}.json")
    if request.configuration not in plans["configurations"]:
        raise InputError(
            f"{preprocessed / request.plans}.json has no configuration {request.configuration!r}; it has "
            f"{', '.join(plans['configurations'])}"
        )
    if folds[-1] >= existing:
        where = "splits_final.json has" if (preprocessed / "splits_final.json").is_file() else "nnU-Net makes"
        raise InputError(f"fold {folds[-1]} does not exist: {where} the folds 0 to {existing - 1}")
    batch = inherited(plans, request.configuration, "batch_size")
    if batch is not None and request.gpus > int(batch):
        raise InputError(
            f"--num-gpus {request.gpus}: a batch of {request.configuration} has {batch} samples, and each GPU needs "
            f"one; take at most {batch} GPUs"
        )
    results = nnunet_folder("nnUNet_results") / preprocessed.name
    number = str(dataset_number(preprocessed.name))
    models = [
        Training(results, number, request.configuration, trainer, request.plans, request.device, request.gpus)
        for trainer in request.trainers
    ]
    options = tuple(request.evaluation_options)
    return make_steps(preprocessed, models, folds, plans, evaluation_options=options, evaluation=request.evaluation)


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
    splits = preprocessed / "splits_final.json"
    for model in models:
        last = []  # what the pooled evaluation waits for
        for fold in folds:
            teacher = teacher_of(model, plans, fold)
            needs: tuple[str, ...] = ()
            if teacher is not None:
                step = Train(teacher, fold=fold)
                steps.setdefault(step.key, step)
                needs = (step.key,)
            train = Train(model, needs, fold=fold)
            steps[train.key] = dataclasses.replace(steps.get(train.key, train), needs=needs)
            last.append(train.key)
            if evaluation and len(folds) > 1:
                evaluate = Evaluate(model, (train.key,), folds=(fold,), splits=splits, options=evaluation_options)
                steps[evaluate.key] = evaluate
                last[-1] = evaluate.key
        if evaluation:
            pool = Evaluate(
                model, tuple(last), folds=tuple(folds), pooled=True, splits=splits, options=evaluation_options
            )
            steps[pool.key] = pool
            pooled.append(pool.key)
    if len(pooled) > 1:
        compare = Compare(models[0], tuple(pooled), models=tuple(models))
        steps[compare.key] = compare
    return list(steps.values())


def teacher_of(model: Training, plans: Mapping[str, Any], fold: int) -> Training | None:
    """The model that must be trained before `model`, a finished one if there is one; None if it needs no teacher.

    Raises
    ------
    ValueError
        If nnU-Net finds no trainer of that name.
    """
    from nnunetv2_mstkd.training.distillation import DistillationTrainer
    from nnunetv2_mstkd.training.settings import Settings, TeacherSettings
    from nnunetv2_mstkd.training.teacher import teacher_configuration

    trainer = find_trainer(model.trainer)
    if not issubclass(trainer, DistillationTrainer):
        return None
    block = inherited(plans, model.configuration, BLOCK)
    wanted = Settings.read(block, [TeacherSettings], strict=False)[TeacherSettings].configuration
    name = trainer.teacher_trainer.__name__
    configuration = teacher_configuration(
        model.results, trainer=name, plans=plans, configuration=model.configuration, fold=fold, wanted=wanted
    )
    return dataclasses.replace(model, trainer=name, configuration=configuration)
