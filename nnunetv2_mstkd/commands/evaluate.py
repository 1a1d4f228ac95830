"""`mstkd evaluate`: measure a model on all subsets of its modalities in one pass."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.commands import model_options as options
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.request import DEFAULT_LESIONS
from nnunetv2_mstkd.inference.evaluation_files import FOLDER, REPORT
from nnunetv2_mstkd.inference.workers import start_server

SAME_NAME = (
    "folds", "trust", "name", "images", "labels", "output", "subsets", "available", "mask_first", "metrics",
    "convention", "lesion_convention", "tolerance", "min_voxels", "stack", "pictures", "restart", "step_size",
)  # fmt: skip
"""Options that :func:`~nnunetv2_mstkd.reporting.evaluate.evaluate` calls by the same name."""

IN_BACKGROUND = "nnunetv2_mstkd.evaluation.cases", "nnunetv2_mstkd.evaluation.scoring"
"""Modules of the functions that background processes call."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd evaluate`: those of nnUNetv2_predict, and those for subsets and metrics."""
    parser.description = (
        "Evaluate a trained model (of any trainer) with all subsets of its modalities, on the validation cases of its "
        "folds or on a folder of images and labels. To resume an interrupted run, repeat the command."
    )
    model = parser.add_argument_group("which model")
    options.add_model(model)
    add = model.add_argument
    add("--name", help="name of the model in tables (default: the name of its folder)")
    add = parser.add_argument_group("which cases (default: the validation cases of each fold)").add_argument
    add("-i", dest="images", metavar="IMAGES", type=Path, help="folder of CASE_000k files; folds are then averaged")
    add("-l", dest="labels", metavar="LABELS", type=Path, help="folder of the labels of these images")
    add("-o", dest="output", metavar="OUT", type=Path, help=f"output folder (default: {FOLDER} in the model folder)")
    add = parser.add_argument_group("which subsets, and what is measured").add_argument
    subsets = "only these subsets; 'all' means the full input (default: every subset)"
    add("--subsets", metavar="T1ce+FLAIR", nargs="+", default=(), help=subsets)
    available = "all subsets of these modalities, those that you have"
    add("--available", metavar="T1,FLAIR", nargs="+", action=options.Modalities, help=available)
    before = "remove channels before preprocessing, as if they had never existed (default: if it changes the others)"
    add("--mask-first", action=argparse.BooleanOptionalAction, help=before)
    metrics = "metrics; dice is always computed (default: dice hd95)"
    add("--metrics", metavar="METRIC", nargs="+", default=("dice", "hd95"), help=metrics)
    add("--convention", default="brats", help="rules for empty masks: brats or nnunet (default: %(default)s)")
    add("--lesion-convention", metavar="NAME", help=f"rules for lesion metrics (default: {DEFAULT_LESIONS})")
    add("--tolerance", metavar="MM", type=float, default=1.0, help="tolerance of nsd in mm (default: %(default)s)")
    add(
        "--et-min",
        dest="min_voxels",
        metavar="[REGION=]N",
        nargs="+",
        default=(),
        help="also score this region (default: ET) as not found if it has fewer predicted voxels; papers use 500",
    )
    run = parser.add_argument_group("how")
    add = run.add_argument
    add("--stack", metavar="N", type=int, help="subsets per forward pass (default: depends on the batch size)")
    cases = f"cases with pictures in {REPORT} (default: 3: worst, median and best)"
    add("--strips", dest="pictures", metavar="N", type=int, default=3, help=cases)
    add("--restart", action="store_true", help="discard earlier results")
    options.add_run(run, export="resampling and metrics")


def _region_and_voxels(text: str) -> tuple[str, int]:
    """``500`` and ``ET=500`` as a region and its number of voxels."""
    region, _, voxels = text.rpartition("=")
    if not voxels.isdecimal():
        raise InputError(f"--et-min {text} is neither a number of voxels nor REGION=NUMBER")
    return region or "ET", int(voxels)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    folder = options.model_folder(args)
    if args.npp or args.nps:
        start_server(*IN_BACKGROUND)  # imports torch at the same time as this process
    from nnunetv2_mstkd.reporting.evaluate import evaluate

    args.min_voxels = dict(map(_region_and_voxels, args.min_voxels))
    evaluation = evaluate(
        folder,
        checkpoint=args.chk,
        mirroring=not args.disable_tta,
        device=options.torch_device(args.device),
        on_device=not args.not_on_device,
        preprocessing_processes=args.npp,
        scoring_processes=args.nps,
        progress=not args.disable_progress_bar,
        report=print,
        **{option: getattr(args, option) for option in SAME_NAME},
    )
    print(f"\n{evaluation.text}\n\nwritten to {evaluation.folder}; open {REPORT} in a browser")
