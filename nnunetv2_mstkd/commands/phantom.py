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
    add = parser.add_argument
    add("-d", "--dataset-id", type=int, required=True, help="number of the data set, for example 901")
    add("--name", default="Phantom", help="name of the data set (default: %(default)s)")
    add("--cases", type=int, default=24, help="training cases (default: %(default)s)")
    add("--test-cases", type=int, default=8, help="test cases with labels (default: %(default)s)")
    add("--spacing", type=float, default=2.0, help="voxel size in mm, 1 to 6 (default: %(default)s)")
    recipes, anatomies = f"one of {', '.join(RECIPES)}", f"one of {', '.join(ANATOMIES)}"
    add("--recipe", default="default", help=f"{recipes}; hard is meant for comparisons (default: %(default)s)")
    add("--anatomy", default="procedural", help=f"{anatomies}; mni needs nilearn (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed; the same seed gives the same images (default: %(default)s)")
    add("--workers", type=int, help="number of processes (default: one per core, at most 8)")
    add("--raw", type=Path, help="nnU-Net's raw folder (default: $nnUNet_raw)")
    add("--overwrite", action="store_true", help="replace an existing phantom")


def run(args: argparse.Namespace) -> None:
    """Write the data set and print a summary."""
    raw = args.raw or os.environ.get("nnUNet_raw")
    if not raw:
        raise InputError("nnUNet_raw is not set: export nnUNet_raw=FOLDER, or pass --raw FOLDER")
    folder, new = write_dataset(
        raw, args.dataset_id, name=args.name, cases=args.cases, test_cases=args.test_cases, spacing=args.spacing,
        recipe=args.recipe, anatomy=args.anatomy, seed=args.seed, workers=args.workers, overwrite=args.overwrite,
        progress=True,
    )  # fmt: skip
    print(f"folder: {folder}" + ("" if new else " (already complete, nothing written)"))
    print(f"cases: {args.cases} for training, {args.test_cases} for testing")
    for line in describe_volumes(folder):
        print(line)
    print(f"note: {DISCLAIMER}")
