"""`mstkd demo`: from data to a comparison of two models, on a small synthetic data set."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2_mstkd.demo.pipeline import Demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd demo`."""
    parser.description = (
        "Make a small synthetic data set with four MRI modalities, train nnU-Net on complete cases, continue from its "
        "weights with ModalityDropoutTrainer on random subsets for as many epochs, evaluate both on the test cases "
        "with all 15 subsets, and compare the two. If the demo is stopped, the same command resumes it."
    )
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("mstkd_demo"), help="output folder (default: ./%(default)s)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: CUDA if there is a GPU")
    add("--trainers", metavar="NAME", nargs="+", default=(), help="also train these, and their teachers")
    add("--epochs", type=int, help="epochs of 50 steps for each model")
    add("--cases", type=int, default=40, help="training cases, 2 of them for validation (default: %(default)s)")
    add("--test-cases", type=int, default=8, help="test cases (default: %(default)s)")
    add("--spacing", type=float, default=5.0, help="voxel size in mm, 2 to 6 (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed for data and training (default: %(default)s)")


def open_demo(args: argparse.Namespace) -> Demo:
    """Return the demo of these options."""
    from nnunetv2_mstkd.demo.pipeline import EPOCHS, Demo, Options, choose_device

    anatomy = "mni" if importlib.util.find_spec("nilearn") else "procedural"
    options = Options(
        choose_device(args.device), EPOCHS if args.epochs is None else args.epochs, args.cases, args.test_cases,
        args.spacing, args.seed, anatomy, tuple(args.trainers),
    )  # fmt: skip
    return Demo(args.out, options)


def run(args: argparse.Namespace) -> None:
    """Run what is not done yet and print the result."""
    from nnunetv2_mstkd.demo.result import write_result

    demo = open_demo(args)
    print(demo.announcement(), flush=True)
    demo.run()
    print(write_result(demo))
