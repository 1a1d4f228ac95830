"""Which steps a cross-validation has, from what the user asked for and what nnU-Net's plans say."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_mstkd.crossval.steps import Compare, Evaluate, Step, Train, Training
from nnunetv2_mstkd.errors import InputError, MissingFileError

STANDARD_FOLDS = 5
"""nnU-Net makes so many where there is no splits_final.json."""


def check_request(preprocessed: Path, model: Training, folds: Sequence[int]) -> dict:
    """Refuse what nnU-Net would only find out in the job, and return the plans.

    Parameters
    ----------
    preprocessed:
        nnUNet_preprocessed/DATASET.

    Raises
    ------
    FileNotFoundError, ValueError
        no plans, no such configuration or fold, fewer samples in a batch than GPUs.
    """
    file = preprocessed / f"{model.plans}.json"
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; make it: nnUNetv2_plan_and_preprocess -d {model.dataset}")
    plans = json.loads(file.read_text(encoding="utf-8"))
    configurations = plans["configurations"]
    if model.configuration not in configurations:
        raise InputError(f"{file} has no configuration {model.configuration!r}; it has {', '.join(configurations)}")
    number = number_of_folds(preprocessed)
    wrong = [fold for fold in folds if fold >= number]
    if wrong:
        where = "splits_final.json has" if (preprocessed / "splits_final.json").is_file() else "nnU-Net makes"
        raise InputError(f"fold {wrong[0]} does not exist: {where} the folds 0 to {number - 1}")
    batch = _inherited(configurations, model.configuration, "batch_size")
    if batch is not None and model.gpus > int(batch):
        raise InputError(
            f"--num-gpus {model.gpus}: a batch of {model.configuration} has {batch} samples, and each GPU needs one; "
            f"take at most {batch} GPUs"
        )
    return plans


def make_steps(
    preprocessed: Path,
    models: Sequence[Training],
    folds: Sequence[int],
    plans: dict,
    *,
    evaluation_options: Sequence[str] = (),
    evaluation: bool = True,
) -> list[Step]:
    """Steps in an order in which each comes after those that it needs.

    For each fold the teacher where the trainer has one, then the trainer; each fold's evaluation; per model the folds
    together; the comparison where there are several models.
    """
    steps: dict[str, Step] = {}
    pooled = []
    splits = preprocessed / "splits_final.json"
    for model in models:
        evaluations = []
        for fold in folds:
            needs: tuple[str, ...] = ()
            teacher = teacher_of(model, plans, fold)
            if teacher is not None:
                step = Train(teacher, fold=fold)
                steps.setdefault(step.key, step)
                needs = (step.key,)
            train = Train(model, needs, fold=fold)
            steps[train.key] = dataclasses.replace(steps.get(train.key, train), needs=needs)
            if evaluation and len(folds) > 1:
                evaluate = Evaluate(
                    model, (train.key,), folds=(fold,), splits=splits, options=tuple(evaluation_options)
                )
                steps[evaluate.key] = evaluate
                evaluations.append(evaluate.key)
            else:
                evaluations.append(train.key)
        if evaluation:
            pool = Evaluate(
                model,
                tuple(evaluations),
                folds=tuple(folds),
                pooled=True,
                splits=splits,
                options=tuple(evaluation_options),
            )
            steps[pool.key] = pool
            pooled.append(pool.key)
    if evaluation and len(models) > 1:
        compare = Compare(models[0], tuple(pooled), models=tuple(models))
        steps[compare.key] = compare
    return list(steps.values())


def teacher_of(model: Training, plans: dict, fold: int) -> Training | None:
    """The model that must be trained before ``model``: a finished one where there is one; None where none is needed.

    Raises
    ------
    ValueError
        if nnU-Net finds no trainer of that name.
    """
    from nnunetv2_mstkd.training.distillation import DistillationTrainer
    from nnunetv2_mstkd.training.settings import BLOCK, Settings
    from nnunetv2_mstkd.training.teacher import teacher_configuration

    trainer = find_trainer(model.trainer)
    if not issubclass(trainer, DistillationTrainer):
        return None
    settings = Settings.from_block(_inherited(plans["configurations"], model.configuration, BLOCK))
    name = trainer.teacher_trainer.__name__
    configuration = teacher_configuration(
        model.results, trainer=name, plans=plans, configuration=model.configuration, fold=fold,
        wanted=settings.teacher.configuration,
    )  # fmt: skip
    return dataclasses.replace(model, trainer=name, configuration=configuration)


def find_trainer(name: str) -> type:
    """The class that ``-tr NAME`` means to nnU-Net.

    Raises
    ------
    ValueError
        if there is none; the message lists ours.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_mstkd import methods as trainers
    from nnunetv2_mstkd.nnunet import registration as _register

    if name in trainers.__all__:
        return getattr(trainers, name)
    _register.register()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = recursive_find_trainer_class_by_name(name)
    except (ImportError, RuntimeError):
        found = None
    if found is None:
        raise InputError(
            f"no trainer {name!r}: neither nnU-Net nor this package has it ({', '.join(trainers.__all__)})"
        )
    return found


def number_of_folds(preprocessed: Path) -> int:
    """How many folds a data set has: those of its ``splits_final.json``, or those that nnU-Net will make."""
    splits = preprocessed / "splits_final.json"
    if not splits.is_file():
        return STANDARD_FOLDS
    return len(json.loads(splits.read_text(encoding="utf-8")))


def _inherited(configurations: dict, name: str, key: str):
    """A value of a configuration or of the nearest one that it inherits from."""
    while name is not None:
        if key in configurations[name]:
            return configurations[name][key]
        name = configurations[name].get("inherits_from")
    return None
