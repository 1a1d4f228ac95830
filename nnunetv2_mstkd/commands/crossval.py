"""`mstkd crossval`: train, evaluate and compare over the folds, on this machine or on a cluster."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from typing import Any

from nnunetv2_mstkd.errors import InputError

DEFAULT_TRAINER = "ModalityDropoutTrainer"
SLURM_OPTIONS = {
    "partition": "NAME", "account": "NAME", "qos": "NAME", "time": "LIMIT", "mem": "SIZE", "cpus-per-task": "N",
    "gres": "LIST", "constraint": "LIST",
}  # fmt: skip
"""Options of sbatch that most clusters require; all others go through --slurm-option."""


def _fold(text: str) -> int:
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a fold number; a cross-validation has numbered folds (fold all has no validation cases: "
            f"train it with nnUNetv2_train)"
        )
    return int(text)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which steps there are: for `mstkd crossval` and `mstkd status`."""
    add = parser.add_argument
    add("-d", dest="dataset", metavar="ID", required=True, help="number or name of the data set")
    add("-c", dest="configuration", metavar="CONFIGURATION", required=True, help="for example 3d_fullres")
    trainers = f"one or more trainers, nnU-Net's own included; several are compared (default: {DEFAULT_TRAINER})"
    add("-tr", dest="trainers", metavar="TRAINER", nargs="+", default=[DEFAULT_TRAINER], help=trainers)
    folds = "folds (default: all in splits_final.json, or nnU-Net's 0 1 2 3 4)"
    add("-f", "--folds", metavar="FOLD", type=_fold, nargs="+", help=folds)
    add("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    add("--no-evaluation", action="store_true", help="train only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd crossval`."""
    parser.description = (
        "For each fold, train the teacher if there is one, train the model, and evaluate every subset of modalities. "
        "Then pool the folds into one report, and compare the trainers if there are several. Finished steps are "
        "skipped, interrupted ones resumed."
    )
    add_plan_arguments(parser)
    add = parser.add_argument_group("how").add_argument
    add("--executor", choices=("local", "slurm"), default="local", help="default: local")
    add("--jobs", metavar="N", type=int, default=1, help="local: number of simultaneous steps (default: 1)")
    add("--gpus", metavar="0,1", help="local: distribute these GPUs over the steps (default: each step sees all)")
    add("--num-gpus", metavar="N", type=int, default=1, help="GPUs per training, nnU-Net's -num_gpus (default: 1)")
    add("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    add("--disable_tta", action="store_true", help="evaluate without mirroring")
    add("--dry-run", action="store_true", help="only print the steps and their commands")
    cluster = parser.add_argument_group("SLURM (--executor slurm)")
    for name, value in SLURM_OPTIONS.items():
        cluster.add_argument(f"--slurm-{name}", metavar=value, help=f"sbatch's --{name}")
    cluster.add_argument(
        "--slurm-option", metavar="KEY[=VALUE]", action="append", default=[],
        help="any other option of sbatch, for example --slurm-option nodelist=node01; can be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the plan, submit it or run it; exit code 1 if a step failed."""
    from nnunetv2_mstkd.crossval import cluster, local, overview
    from nnunetv2_mstkd.crossval.steps import NO_MIRRORING

    gpus = _gpus(args)
    sbatch = _sbatch_options(args)
    if args.executor == "slurm" and not args.dry_run:
        cluster.check_cluster()
    steps = planned_steps(args, args.device, args.num_gpus, (NO_MIRRORING,) if args.disable_tta else ())
    for step in steps:
        step.check_options()
    if args.dry_run:
        print(overview.commands(steps))
        return 0
    if args.executor == "slurm":
        jobs = cluster.submit_steps(steps, sbatch)
        print(f"{len(jobs)} jobs submitted; follow them with {_status_command(args)}")
        return 0
    outcome = local.run_steps(steps, jobs=args.jobs, gpus=gpus, report=partial(print, flush=True))
    problems = overview.problems(steps, outcome)
    for line in problems:
        print(f"mstkd crossval: {line}", file=sys.stderr)
    print(f"{len(steps) - len(problems)} of {len(steps)} steps are done")
    return 1 if problems else 0


def _status_command(args: argparse.Namespace) -> str:
    """The command that shows the same steps."""
    words = ["mstkd", "status", "-d", args.dataset, "-c", args.configuration, "-tr", *args.trainers]
    words += [] if args.folds is None else ["-f", *map(str, args.folds)]
    words += [] if args.p == "nnUNetPlans" else ["-p", args.p]
    return shlex.join([*words, *(["--no-evaluation"] if args.no_evaluation else [])])


def planned_steps(args: argparse.Namespace, device: str = "cpu", gpus: int = 1, options: tuple[str, ...] = ()) -> list:
    """The steps that the arguments of :func:`add_plan_arguments` ask for; `options` are those of the evaluation."""
    from nnunetv2_mstkd.crossval.plan import plan_steps

    return plan_steps(
        args.dataset, args.configuration, args.trainers, args.folds, plans_name=args.p, device=device, gpus=gpus,
        evaluation=not args.no_evaluation, evaluation_options=options,
    )  # fmt: skip


def _gpus(args: argparse.Namespace) -> list[str]:
    if args.jobs < 1 or args.num_gpus < 1:
        raise InputError(f"--jobs {args.jobs} --num-gpus {args.num_gpus}: expected numbers from 1")
    if args.num_gpus > 1 and args.device != "cuda":
        raise InputError(f"--num-gpus {args.num_gpus} needs -device cuda")
    if args.jobs > 1 and args.executor != "local":
        raise InputError(f"--jobs {args.jobs} is for --executor local; SLURM decides how many jobs run at once")
    if args.disable_tta and args.no_evaluation:
        raise InputError("--disable_tta is an option of the evaluation, which --no-evaluation leaves out")
    gpus = [text.strip() for text in (args.gpus or "").split(",") if text.strip()]
    if gpus and (args.executor != "local" or args.device != "cuda"):
        raise InputError(
            "--gpus shares GPUs of this machine among the steps: it needs --executor local and -device cuda"
        )
    if gpus and len(gpus) < args.num_gpus:
        raise InputError(f"--gpus names {len(gpus)} GPUs, a training takes {args.num_gpus} (--num-gpus)")
    return gpus


def _sbatch_options(args: argparse.Namespace) -> dict[str, Any]:
    from nnunetv2_mstkd.crossval.cluster import sbatch_options

    named = {name: getattr(args, f"slurm_{name.replace('-', '_')}") for name in SLURM_OPTIONS}
    options = sbatch_options(named, args.slurm_option)
    if options and args.executor != "slurm":
        raise InputError(f"--slurm-{next(iter(options))} needs --executor slurm")
    return options
