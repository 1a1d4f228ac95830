"""Options that `mstkd predict`, `evaluate` and `fill-missing` share, each declared once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.nnunet.folders import FINAL, find_model_folder
from nnunetv2_mstkd.processes import usable_cores

if TYPE_CHECKING:
    import torch

    from nnunetv2_mstkd.nnunet.input_folder import Problem

DEVICES = ("cuda", "cpu", "mps")
EXIT_LEFT_OUT = 1


# ---- declaring -----------------------------------------------------------------------------------------------------


class Modalities(argparse.Action):
    """Modalities as ``T1,FLAIR`` or as several words."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Keep them separated by commas."""
        setattr(namespace, self.dest, ",".join(values))


def add_input(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Declare ``-i``, the folder of images of which any may be absent."""
    parser.add_argument("-i", metavar="IN", type=Path, required=required, help="folder of CASE_000k files; only read")


def add_case_selection(parser: argparse._ActionsContainer) -> None:
    """Declare ``--drop`` and ``--skip-bad``."""
    add = parser.add_argument
    dropped = "treat these modalities as absent; their files are not read"
    add("--drop", metavar="T1ce,FLAIR", nargs="+", action=Modalities, help=dropped)
    add("--skip-bad", action="store_true", help="leave bad cases out, list them, and exit with code 1")


def add_dataset_or_model(parser: argparse._ActionsContainer) -> None:
    """Declare ``-d`` and ``-m``, of which one is required."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("-d", metavar="ID", help="number or name of the data set")
    group.add_argument("-m", metavar="MODEL", type=Path, help="folder of a trained model, with plans.json")


def add_model(parser: argparse._ActionsContainer, *, folds: Sequence[int] | None = None) -> None:
    """Declare which trained model: ``-d -c -tr -p`` or ``-m``, and ``-f``, ``-chk`` and ``--trust``.

    ``folds`` is the default of ``-f``; None stands for all folds that are trained.
    """
    add_dataset_or_model(parser)
    default = "all trained folds" if folds is None else " ".join(map(str, folds))
    add = parser.add_argument
    add("-c", metavar="CONFIGURATION", help="configuration, for example 3d_fullres")
    add("-f", "--folds", metavar="FOLD", nargs="+", default=folds, help=f"folds (default: {default})")
    add("-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer (default: %(default)s)")
    add("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    add("-chk", metavar="FILE", default=FINAL, help="checkpoint file name (default: %(default)s)")
    add("--trust", action="store_true", help="let nnU-Net load the model: this executes whatever its files contain")


def add_run(parser: argparse._ActionsContainer, *, export: str = "export") -> None:
    """Declare how the network runs: ``-step_size --disable_tta -npp -nps -device --not_on_device``, and the bar.

    ``export`` is what the processes of ``-nps`` do.
    """
    add = parser.add_argument
    add("-step_size", metavar="S", type=float, default=0.5, help="step of the sliding window (default: %(default)s)")
    add("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    for option, work in (("npp", "preprocessing"), ("nps", export)):
        value = os.environ.get(f"nnUNet_{option}", "")
        processes = int(value) if value.isdecimal() else 3
        add(f"-{option}", metavar="N", type=int, default=processes, help=f"processes for {work} (default: %(default)s)")
    add("-device", choices=DEVICES, default=DEVICES[0], help="default: %(default)s")
    add("--not_on_device", action="store_true", help="collect results in main memory instead, for very large images")
    add_progress(parser)


def add_progress(parser: argparse._ActionsContainer) -> None:
    """Declare ``--disable_progress_bar``."""
    parser.add_argument("--disable_progress_bar", action="store_true", help="for jobs without a terminal")


# ---- using ---------------------------------------------------------------------------------------------------------


def model_folder(args: argparse.Namespace) -> Path:
    """Check the options of :func:`add_model` and :func:`add_run`, and return the model's folder, without torch."""
    if args.d is not None and args.c is None:
        raise InputError("-d needs -c CONFIGURATION, for example -c 3d_fullres")
    if not 0 < args.step_size <= 1:
        raise InputError(f"-step_size is {args.step_size}, expected above 0 and at most 1")
    if min(args.npp, args.nps) < 0:
        raise InputError(f"-npp {args.npp} -nps {args.nps}: expected numbers of processes, or 0 for none")
    warn_if_trusted(args)
    if args.m is not None and not args.m.is_dir():
        raise MissingFileError(f"no model folder {args.m}")
    return args.m or find_model_folder(args.d, args.tr, args.p, args.c)


def warn_if_trusted(args: argparse.Namespace) -> None:
    """Warn of what ``--trust`` allows."""
    if args.trust:
        print("warning: --trust unpickles the checkpoint, which executes whatever it contains", file=sys.stderr)


def torch_device(name: str) -> torch.device:
    """Return the torch device; with one thread beside a GPU, as in nnUNetv2_predict, else all cores it may use."""
    import torch

    from nnunetv2_mstkd.nnunet.model import find_device

    device = find_device(name)
    if device.type != "cpu":
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    return device


def report_left_out(problems: Sequence[Problem]) -> int:
    """Print the problems of the cases that were left out on stderr; exit code 1 if there are any, else 0."""
    from nnunetv2_mstkd.inference.checks import count_problems, format_problems

    if not problems:
        return 0
    print(f"{count_problems(problems)}, left out:{format_problems(problems)}", file=sys.stderr)
    return EXIT_LEFT_OUT
