"""`mstkd demo`: the whole method on a small synthetic data set."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from nnunetv2_mstkd.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd demo`."""
    parser.description = (
        "Make a small synthetic data set with four MRI modalities, train a full-modality teacher and an MST-KDNet "
        "student with nnU-Net's own commands, take modalities away from test cases, predict all 15 subsets with "
        "nnUNetv2_predict and print the Dice of both. A second call continues where the first was stopped."
    )
    parser.add_argument("--out", type=Path, default=Path("mstkd_demo"), help="output folder (default: ./%(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: CUDA where there is one"
    )
    parser.add_argument("--epochs", type=int, help="epochs of the student; the teacher's follow in proportion")
    parser.add_argument(
        "--cases", type=int, default=40, help="training cases, 2 of them for validation (default: %(default)s)"
    )
    parser.add_argument("--test-cases", type=int, default=8, help="test cases (default: %(default)s)")
    parser.add_argument("--spacing", type=float, default=5.0, help="voxel edge in mm, 2 to 6 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training (default: %(default)s)")
    parser.add_argument(
        "--controls", action="store_true", help="train the student without distillation and FullModalityTrainer too"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet and print the result."""
    _check(args)
    # after the checks: these import torch
    from nnunetv2_mstkd.demo import pictures, result
    from nnunetv2_mstkd.demo.pipeline import CHANNELS, STUDENT, TEACHER, Demo, Options, budget

    options = Options(
        device=_device(args.device),
        epochs=args.epochs,
        cases=args.cases,
        test_cases=args.test_cases,
        spacing=args.spacing,
        seed=args.seed,
        anatomy="mni" if importlib.util.find_spec("nilearn") else "procedural",
        controls=args.controls,
    )
    demo = Demo(args.out, options)
    minutes = budget(options)
    where = "estimated on two CPU cores; less on a GPU" if options.device == "cuda" else "estimated on two CPU cores"
    print(f"time budget ({where}): " + ", ".join(f"{name} {value:.0f} min" for name, value in minutes))
    total = sum(value for _, value in minutes)
    print(f"about {total:.0f} minutes in all; device {options.device}; output in {demo.folder}\n")
    identifiers = demo.run()

    labels = result.regions(demo.raw / "dataset.json")
    predictions = demo.predictions()
    scores = result.score(identifiers, predictions, demo.raw / "labelsTs", labels)
    scores.to_csv(demo.folder / "results.csv", index=False)
    heat_map, slices = demo.folder / "heatmap.png", demo.folder / "slices.png"
    pictures.heat_map(scores, heat_map)
    case = _typical_case(scores[scores["model"] == STUDENT.title])
    shown = ("T1", "FLAIR", "T1ce", "T1+T2", "T1ce+FLAIR", "T1+T1ce+T2+FLAIR")
    chosen = {title: predictions[title] for title in (TEACHER.title, STUDENT.title)}
    reference = demo.raw / "labelsTs" / f"{case}.nii.gz"
    pictures.slices(case, shown, demo.raw / "imagesTs", reference, chosen, CHANNELS, scores, slices)

    cases = scores["case"].nunique()
    print(f"\nDice in percent, mean over {cases} test cases (WT whole tumor, TC tumor core, ET enhancing tumor)\n")
    print(result.table(scores, CHANNELS))
    print("\nmean over regions, by the number of modalities that are there\n")
    print(result.summary(scores))
    seconds = sum(demo.state.content["seconds"].values())
    print(f"\n{pictures.DISCLAIMER}")
    print(f"measured in {seconds / 60:.1f} minutes of computing\n")
    for what, path in (
        ("heat map", heat_map),
        ("one slice, several subsets", slices),
        ("all numbers", demo.folder / "results.csv"),
        ("predictions (NIfTI)", predictions[STUDENT.title]),
        ("trained models", demo.folder / "results"),
    ):
        print(f"{what + ':':<28}{path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.cases < 6:
        raise InputError(f"--cases is {args.cases}, expected at least 6 (2 of them are for validation)")
    if args.test_cases < 1:
        raise InputError(f"--test-cases is {args.test_cases}, expected at least 1")
    if not 2 <= args.spacing <= 6:
        raise InputError(f"--spacing is {args.spacing}, expected 2 to 6 mm")
    if args.epochs is not None and args.epochs < 1:
        raise InputError(f"--epochs is {args.epochs}, expected at least 1")
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed is {args.seed}, expected 0 to 2^31 - 1")


def _device(asked: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise InputError("--device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or leave it out")
    return "cuda" if available and asked != "cpu" else "cpu"


def _typical_case(scores) -> str:
    """The case of median Dice: neither the prettiest nor the worst one."""
    means = scores.groupby("case")["dice"].mean().sort_values()
    return str(means.index[len(means) // 2])
