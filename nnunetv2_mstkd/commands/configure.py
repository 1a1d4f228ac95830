"""`mstkd configure`: derive a configuration with other settings from an existing one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

from nnunetv2_mstkd.errors import InputError, MissingFileError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd configure`."""
    parser.description = (
        "Write a new configuration into the plans of a preprocessed data set. It inherits from an existing one, shares "
        "its preprocessed data and has its own results folder. Train it with nnUNetv2_train ID NAME FOLD -tr "
        "MSTKDTrainer."
    )
    parser.add_argument("-d", "--dataset", required=True, help="number or full name of the data set")
    parser.add_argument("-c", "--configuration", default="3d_fullres", help="parent (default: %(default)s)")
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("--name", required=True, help="name of the new configuration, for example 3d_fullres_short")
    parser.add_argument("--epochs", type=int, help="short for --set schedule.epochs=N")
    parser.add_argument("--iterations", type=int, help="steps per epoch; short for --set schedule.iterations=N")
    parser.add_argument("--seed", type=int, help="short for --set schedule.seed=N")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any setting, for example distillation.kl=0 or sampler.kind=by_size; may be given several times",
    )
    parser.add_argument("--features", type=int, nargs="+", metavar="N", help="channels per stage, finest first")
    parser.add_argument("--patch", type=int, nargs="+", metavar="N", help="patch size in voxels")
    parser.add_argument("--batch-size", type=int, help="samples per training step")
    parser.add_argument("--overwrite", action="store_true", help="replace a configuration of this name")


def run(args: argparse.Namespace) -> int:
    """Write the configuration and print what differs from the defaults."""
    from nnunetv2_mstkd.nnunet import configuration
    from nnunetv2_mstkd.training.settings import BLOCK, read_assignment

    assignments = [read_assignment(text) for text in args.set]
    for option in ("epochs", "iterations", "seed"):
        if getattr(args, option) is not None:
            assignments.append(("schedule", option, getattr(args, option)))
    plans_file = preprocessed_folder(args.dataset) / f"{args.plans}.json"
    plans = configuration.read_plans(plans_file)
    entry = configuration.derive(
        plans,
        args.configuration,
        args.name,
        assignments=assignments,
        features=args.features,
        patch_size=args.patch,
        batch_size=args.batch_size,
    )
    check_subsets(entry[BLOCK], plans_file.with_name("dataset.json"))
    configuration.write_configuration(plans_file, args.name, entry, overwrite=args.overwrite)
    print(f"configuration {args.name} (from {args.configuration}) in {plans_file}")
    for line in configuration.describe(entry):
        print(f"  {line}")
    return 0


def check_subsets(block: Mapping, dataset_json: Path) -> None:
    """Refuse subsets of modalities that the data set does not have; ValueError names the known ones."""
    from nnunetv2_mstkd.modalities import modality_names
    from nnunetv2_mstkd.training.settings import Settings

    settings = Settings.from_block(block)
    if dataset_json.is_file() and (settings.sampler.subsets or settings.sampler.weights or settings.adamm.subsets):
        names = modality_names(json.loads(dataset_json.read_text(encoding="utf-8")))
        settings.sampler.build(names)
        settings.adamm.channel_numbers(names)


def preprocessed_folder(dataset: str) -> Path:
    """The folder of a data set, given by number or name, below nnUNet_preprocessed."""
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise InputError("nnUNet_preprocessed is not set: export nnUNet_preprocessed=FOLDER")
    if dataset.isdigit():
        found = sorted(path for path in Path(root).glob(f"Dataset{int(dataset):03d}_*") if path.is_dir())
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise MissingFileError(f"expected one data set {int(dataset):03d} in {root}, found {names}")
        return found[0]
    return Path(root) / dataset
