"""`mstkd phantom`: write a synthetic data set."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.phantom.anatomy import ANATOMIES
from nnunetv2_mstkd.phantom.dataset import DISCLAIMER, describe_volumes, write_dataset
from nnunetv2_mstkd.phantom.recipe import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd phantom`."""
    parser.description = (
        "Write synthetic brains with tumors (T1, T1ce, T2, FLAIR; whole tumor, tumor core, enhancing tumor) as an "
        "nnU-Net raw data set, for tests, demonstrations and method comparisons. Phantom numbers say nothing about "
        "clinical performance."
    )
    parser.add_argument("-d", "--dataset-id", type=int, required=True, help="number of the data set, for example 901")
    parser.add_argument("--name", default="Phantom", help="name of the data set (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=24, help="training cases (default: %(default)s)")
    parser.add_argument("--test-cases", type=int, default=8, help="test cases with labels (default: %(default)s)")
    parser.add_argument("--spacing", type=float, default=2.0, help="voxel edge in mm, 1 to 6 (default: %(default)s)")
    parser.add_argument(
        "--recipe",
        default="default",
        help=f"one of {', '.join(RECIPES)}; hard is meant for comparisons (default: %(default)s)",
    )
    parser.add_argument(
        "--anatomy",
        default="procedural",
        help=f"one of {', '.join(ANATOMIES)}; mni needs nilearn (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core, at most 8)")
    parser.add_argument("--raw", type=Path, default=None, help="nnU-Net's raw folder (default: $nnUNet_raw)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing phantom")


def run(args: argparse.Namespace) -> None:
    """Write the data set and print a summary."""
    raw = args.raw or os.environ.get("nnUNet_raw")
    if not raw:
        raise InputError("nnUNet_raw is not set: export nnUNet_raw=FOLDER, or pass --raw FOLDER")
    folder, new = write_dataset(
        raw,
        args.dataset_id,
        name=args.name,
        cases=args.cases,
        test_cases=args.test_cases,
        spacing=args.spacing,
        recipe=args.recipe,
        anatomy=args.anatomy,
        seed=args.seed,
        workers=args.workers,
        progress=True,
        overwrite=args.overwrite,
    )
    print(f"folder: {folder}" + ("" if new else " (already complete, nothing written)"))
    print(f"cases: {args.cases} for training, {args.test_cases} for testing")
    for line in describe_volumes(folder):
        print(line)
    print(f"note: {DISCLAIMER}")
