"""`mstkd evaluate`: measure a model on all subsets of its modalities in one pass."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.commands.predict import add_model, torch_device, whole_number_from_environment
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.request import DEFAULT_LESIONS
from nnunetv2_mstkd.inference.evaluation_files import FOLDER, REPORT
from nnunetv2_mstkd.inference.workers import start_server

SAME_NAME = (
    "trust", "name", "subsets", "available", "mask_first", "metrics", "convention", "lesion_convention", "tolerance",
    "restart",
)  # fmt: skip
"""Options that :func:`~nnunetv2_mstkd.reporting.evaluate.evaluate` calls by the same name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd evaluate`: those of nnUNetv2_predict, and those for subsets and metrics."""
    parser.description = (
        "Measure a trained model, of any trainer, on all subsets of its modalities: on the validation cases of its "
        "folds, or on a folder of images and labels. An interrupted run continues when it is started again."
    )
    model = parser.add_argument_group("which model")
    add_model(parser)
    add = model.add_argument
    add("-c", metavar="CONFIGURATION", help="configuration, for example 3d_fullres")
    add("-f", "--folds", metavar="FOLD", nargs="+", help="folds to pool (default: all that are trained)")
    add("-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer (default: %(default)s)")
    add("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    add("-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint file name (default: %(default)s)")
    add("--trust", action="store_true", help="let nnU-Net load the model: this executes whatever its files contain")
    add("--name", help="name of the model in tables (default: that of its folder)")
    add = parser.add_argument_group("which cases (default: the validation cases of each fold)").add_argument
    add("-i", metavar="IMAGES", type=Path, help="folder of CASE_000k files; folds are then averaged")
    add("-l", metavar="LABELS", type=Path, help="folder of their labels")
    add("-o", metavar="OUT", type=Path, help=f"output folder (default: {FOLDER} in the model folder)")
    add = parser.add_argument_group("which subsets, and what is measured").add_argument
    add("--subsets", metavar="T1ce+FLAIR", nargs="+", default=(), help="only these; all: the full input (default: all)")
    add("--available", metavar="T1,FLAIR", help="only subsets of these modalities: those that you have")
    add("--mask-first", action="store_true", help="remove channels before preprocessing, as if they had never existed")
    add("--metrics", metavar="METRIC", nargs="+", default=("dice", "hd95"), help="default: dice hd95; dice always")
    add("--convention", default="brats", help="rules for empty masks: brats or nnunet (default: %(default)s)")
    add("--lesion-convention", metavar="NAME", help=f"rules for lesion metrics (default: {DEFAULT_LESIONS})")
    add("--tolerance", metavar="MM", type=float, default=1.0, help="tolerance of nsd in mm (default: %(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--stack", metavar="N", type=int, help="subsets per forward pass (default: by the batch size)")
    add("--strips", metavar="N", type=int, default=3, help=f"cases in {REPORT} (default: 3, worst, median and best)")
    add("--restart", action="store_true", help="discard earlier results")
    add("-step_size", metavar="S", type=float, default=0.5, help="step of the window (default: %(default)s)")
    add("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    for option, work in (("npp", "preprocessing"), ("nps", "resampling and metrics")):
        number = whole_number_from_environment(f"nnUNet_{option}", 3)
        text = f"processes for {work} (default: %(default)s)"
        add(f"-{option}", metavar="N", type=int, default=number, help=text)
    add("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    add("--not_on_device", action="store_true", help="collect results in main memory: for huge images")
    add("--disable_progress_bar", action="store_true", help="for jobs without a terminal")


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    if args.npp or args.nps:
        start_server()  # imports torch at the same time as this process
    from nnunetv2_mstkd.reporting.evaluate import evaluate

    evaluation = evaluate(
        _model_folder(args),
        folds=args.folds,
        checkpoint=args.chk,
        images=args.i,
        labels=args.l,
        output=args.o,
        stack=args.stack,
        pictures=args.strips,
        step_size=args.step_size,
        mirroring=not args.disable_tta,
        device=torch_device(args.device),
        on_device=not args.not_on_device,
        preprocessing_processes=args.npp,
        scoring_processes=args.nps,
        progress=not args.disable_progress_bar,
        report=print,
        **{option: getattr(args, option) for option in SAME_NAME},
    )
    print(f"\n{evaluation.text}\n\nwritten to {evaluation.folder}; {REPORT} is the page to look at")


def _model_folder(args: argparse.Namespace) -> Path:
    if args.m is not None:
        return args.m
    if args.c is None:
        raise InputError("-d needs -c CONFIGURATION, for example -c 3d_fullres")
    from nnunetv2_mstkd.nnunet.model_folder import find_model_folder

    return find_model_folder(args.d, args.tr, args.p, args.c)
