"""`mstkd crossval`: train, evaluate and compare over the folds, on this machine or on a cluster."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from nnunetv2_mstkd.errors import InputError

DEFAULT_TRAINER = "MSTKDTrainer"
SLURM_OPTIONS = {
    "partition": "NAME",
    "account": "NAME",
    "qos": "NAME",
    "time": "LIMIT",
    "mem": "SIZE",
    "cpus-per-task": "N",
    "gres": "LIST",
    "constraint": "LIST",
}
"""Options of sbatch that most clusters ask for; the others go through --slurm-option."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which steps there are: for `mstkd crossval` and `mstkd status`."""
    parser.add_argument("dataset", metavar="ID", help="data set, number or name, as for nnUNetv2_train")
    parser.add_argument("configuration", metavar="CONFIGURATION", help="for example 3d_fullres")
    parser.add_argument(
        *("--trainer", "-tr"), metavar="TRAINER", nargs="+", default=[DEFAULT_TRAINER],
        help=f"one or several, nnU-Net's own too: several are compared in the end (default: {DEFAULT_TRAINER})",
    )  # fmt: skip
    parser.add_argument(
        *("--folds", "-f"),
        metavar="FOLD",
        type=int,
        nargs="+",
        help="default: all that splits_final.json has, or nnU-Net's 0 1 2 3 4",
    )  # fmt: skip
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("--no-evaluation", action="store_true", help="train only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd crossval`."""
    parser.description = (
        "For each fold train the teacher, where the trainer has one, and then the trainer's own model; evaluate every "
        "subset of modalities; gather the folds into one report; compare the trainers if there are several. What is "
        "done is skipped, what was stopped goes on."
    )
    add_plan_arguments(parser)
    run_group = parser.add_argument_group("how")
    run_group.add_argument("--executor", choices=("local", "slurm"), default="local", help="default: local")
    run_group.add_argument("--jobs", metavar="N", type=int, default=1, help="local: steps at once (default: 1)")
    run_group.add_argument(
        "--gpus", metavar="0,1", help="local: share these GPUs out among the steps (default: each step sees all)"
    )
    run_group.add_argument(
        "--num-gpus", metavar="N", type=int, default=1, help="GPUs of one training, -num_gpus of nnU-Net (default: 1)"
    )
    run_group.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    run_group.add_argument("--disable_tta", action="store_true", help="evaluate without mirroring")
    run_group.add_argument("--dry-run", action="store_true", help="print the steps and their commands, and do nothing")
    cluster = parser.add_argument_group("SLURM (--executor slurm)")
    for name, value in SLURM_OPTIONS.items():
        cluster.add_argument(f"--slurm-{name}", metavar=value, help=f"--{name} of sbatch")
    cluster.add_argument(
        "--slurm-option", metavar="KEY=VALUE", action="append", default=[],
        help="any other option of sbatch, for example --slurm-option nodelist=node01; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Check, print the plan, run or submit it; exit code 1 if a step failed."""
    if args.jobs < 1 or args.num_gpus < 1:
        raise InputError(f"--jobs {args.jobs} --num-gpus {args.num_gpus}: expected numbers from 1")
    gpus = _gpus(args)
    options = slurm_options(args)
    if args.executor == "slurm" and not args.dry_run:
        from nnunetv2_mstkd.crossval.cluster import check_cluster

        check_cluster()
    steps = steps_of(args, args.device, args.num_gpus, ["--disable_tta"] if args.disable_tta else [])

    if args.dry_run:
        for step in steps:
            state = "done   " if step.done() else "to do  "
            print(f"{state} {step.title}\n        {shlex.join(step.command())}")
            titles = [other.title for other in steps if other.key in step.needs]
            if titles:
                print(f"        after: {'; '.join(titles)}")
        return 0
    if args.executor == "slurm":
        from nnunetv2_mstkd.crossval.cluster import submit_steps

        jobs = submit_steps(steps, options)
        print(f"{len(jobs)} jobs submitted; follow them with mstkd status {args.dataset} {args.configuration} ...")
        return 0
    return _run_here(steps, args.jobs, gpus)


def steps_of(args: argparse.Namespace, device: str, gpus: int, evaluation_options: Sequence[str]) -> list:
    """The steps that the arguments of :func:`add_plan_arguments` ask for.

    Raises
    ------
    FileNotFoundError, ValueError
        if the data set, plans, configuration, a fold or a trainer does not exist.
    """
    from nnunetv2_mstkd.crossval.plan import check_request, make_steps, number_of_folds
    from nnunetv2_mstkd.crossval.steps import Training
    from nnunetv2_mstkd.nnunet.folders import nnunet_folder
    from nnunetv2_mstkd.nnunet.model_folder import find_dataset_folder

    preprocessed = find_dataset_folder("nnUNet_preprocessed", args.dataset)
    folds = list(range(number_of_folds(preprocessed))) if args.folds is None else args.folds
    for what, values in (("--trainer", args.trainer), ("--folds", folds)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise InputError(f"{what} names {twice[0]} twice")
    if min(folds) < 0:
        raise InputError(f"--folds {min(folds)}: folds are numbers from 0")
    results = nnunet_folder("nnUNet_results") / preprocessed.name
    number = preprocessed.name[len("Dataset") :].split("_")[0]
    models = [
        Training(results, str(int(number)), args.configuration, trainer, args.p, device, gpus)
        for trainer in args.trainer
    ]
    plans: dict[str, Any] = {}
    for model in models:
        plans = check_request(preprocessed, model, folds)
    return make_steps(
        preprocessed,
        models,
        sorted(folds),
        plans,
        evaluation_options=evaluation_options,
        evaluation=not args.no_evaluation,
    )


def slurm_options(args: argparse.Namespace) -> dict[str, str]:
    """The options for sbatch by name.

    Raises
    ------
    ValueError
        if one is not KEY=VALUE, or any is given without ``--executor slurm``.
    """
    given = {name: getattr(args, f"slurm_{name.replace('-', '_')}") for name in SLURM_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    for text in args.slurm_option:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--slurm-option {text}: expected KEY=VALUE")
        options[key.strip().lstrip("-")] = value
    if options and args.executor != "slurm":
        raise InputError(f"--slurm-{next(iter(options))} needs --executor slurm")
    if "time" in options:
        from nnunetv2_mstkd.crossval.cluster import minutes_of

        minutes_of(options["time"])
    return options


def _gpus(args: argparse.Namespace) -> list[str]:
    gpus = [text.strip() for text in (args.gpus or "").split(",") if text.strip()]
    if gpus and (args.executor != "local" or args.device != "cuda"):
        raise InputError("--gpus shares out GPUs of this machine: it needs --executor local and -device cuda")
    if gpus and len(gpus) < args.num_gpus:
        raise InputError(f"--gpus names {len(gpus)} GPUs, a training takes {args.num_gpus} (--num-gpus)")
    return gpus


def _run_here(steps: Sequence, jobs: int, gpus: Sequence[str]) -> int:
    from nnunetv2_mstkd.crossval.local import run_steps

    outcome = run_steps(steps, jobs=jobs, gpus=gpus, report=lambda line: print(line, flush=True))
    titles = {step.key: step.title for step in steps}
    for key, reason in outcome.left.items():
        print(f"not run {titles[key]}: {reason.replace('it needs ', 'it needs: ')}")
    for key, reason in outcome.failed.items():
        print(f"mstkd crossval: {titles[key]} failed: {reason}", file=sys.stderr)
    left = len(outcome.failed) + len(outcome.left)
    print(f"{len(steps) - left} of {len(steps)} steps are done")
    return 1 if left else 0
