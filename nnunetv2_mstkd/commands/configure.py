"""`mstkd configure`: derive a configuration with other settings from an existing one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd configure`."""
    parser.description = (
        "Write a new configuration into the plans of a preprocessed data set. It inherits from an existing one, shares "
        "its preprocessed data, and has its own results folder. Train it with nnUNetv2_train ID NAME FOLD -tr TRAINER."
    )
    add = parser.add_argument
    add("-d", "--dataset", required=True, help="number or full name of the data set")
    add("-c", "--configuration", default="3d_fullres", help="parent configuration (default: %(default)s)")
    add("-p", "--plans", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    add("--name", required=True, help="name of the new configuration, for example 3d_fullres_short")
    add("--epochs", type=int, help="short for --set schedule.epochs=N")
    add("--iterations", type=int, help="steps per epoch; short for --set schedule.iterations=N")
    add("--seed", type=int, help="short for --set schedule.seed=N")
    setting = "any setting, for example mstkd.kl=0 or sampler.kind=by_size; may be given several times"
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=setting)
    add("--features", type=int, nargs="+", metavar="N", help="channels per stage, finest first")
    add("--patch", type=int, nargs="+", metavar="N", help="patch size in voxels")
    add("--batch-size", type=int, help="samples per training step")
    add("--overwrite", action="store_true", help="replace a configuration of this name")


def run(args: argparse.Namespace) -> None:
    """Write the configuration and print what differs from the defaults."""
    from nnunetv2_mstkd.methods.configuration import configure, read_assignments
    from nnunetv2_mstkd.methods.registry import simplest_trainer
    from nnunetv2_mstkd.modalities import modality_names
    from nnunetv2_mstkd.nnunet.description import read_description
    from nnunetv2_mstkd.nnunet.folders import dataset_argument, find_dataset_folder, find_raw_folder
    from nnunetv2_mstkd.nnunet.mask_differences import of_plans
    from nnunetv2_mstkd.nnunet.plans import BLOCK, read_plans, write_configuration

    short = {f"schedule.{key}": getattr(args, key) for key in ("epochs", "iterations", "seed")}
    texts = [*args.set, *(f"{key}={value}" for key, value in short.items() if value is not None)]
    assignments = read_assignments(texts)
    folder = find_dataset_folder("nnUNet_preprocessed", args.dataset)
    plans_file = folder / f"{args.plans}.json"
    plans, names = read_plans(plans_file), modality_names(read_description(folder / "dataset.json"))
    entry = configure(
        plans,
        args.configuration,
        args.name,
        assignments=assignments,
        modalities=names,
        features=args.features,
        patch_size=args.patch,
        batch_size=args.batch_size,
    )
    given = {(section, key): value for section, key, value in assignments}
    start = given.get(("schedule", "init_from"))
    note = _check_start(start)
    changed = plans["configurations"].get(args.name) not in (None, entry)
    write_configuration(plans_file, args.name, entry, overwrite=args.overwrite)
    print(f"configuration {args.name} (from {args.configuration}) in {plans_file}")
    for line in affected(plans, args.name, folder.name) if changed else ():
        print(f"  note: {line}")
    for line in describe(entry):
        print(f"  {line}")
    for line in replaced(plans, args.configuration, entry, given):
        print(f"  note: {line}")
    differences = of_plans(folder, find_raw_folder(folder.name), plans, args.configuration, names)
    if differences:
        print(f"  {differences}; see input.normalization in documentation/data.md")
    if note:
        print(f"  note: {note}")
    trainer = simplest_trainer({section for section, _ in given})
    if trainer is not None and trainer.__name__ == start:
        print(
            f"  note: {start} itself starts from random weights; others start from it, or name its checkpoint_final.pth"
        )
    elif trainer is not None:
        teacher = getattr(trainer, "teacher_trainer", None)
        first = f"{teacher.__name__}, then -tr " if teacher and not entry[BLOCK]["teacher"]["joint"] else ""
        words = f"nnUNetv2_train {dataset_argument(folder.name)} {args.name} 0"
        words += f" -p {args.plans}" if args.plans != "nnUNetPlans" else ""
        print(f"train it, for example: {words} -tr {first}{trainer.__name__}")


def _check_start(source: str | None) -> str | None:
    """What to tell about ``schedule.init_from``; InputError if it names no trainer that nnU-Net finds."""
    from nnunetv2_mstkd.nnunet.trainers import find_trainer
    from nnunetv2_mstkd.training.settings import ScheduleSettings

    if source is None:
        return None
    if not ScheduleSettings.is_file(source):
        find_trainer(source)
        return None
    file = Path(os.environ.get("nnUNet_results", ""), source)
    return None if file.is_file() else f"schedule.init_from: {file} does not exist yet"


def replaced(plans: Mapping[str, Any], parent: str, entry: Mapping[str, Any], given: Collection) -> list[str]:
    """Return one line for each setting of the parent that was not given and yet changes: those that a recipe sets."""
    from nnunetv2_mstkd.methods.configuration import complete_block
    from nnunetv2_mstkd.nnunet.plans import BLOCK, inherited

    before, after, plain = map(complete_block, (inherited(plans, parent, BLOCK), entry[BLOCK], None))
    return [
        f"{section}.{key} is no longer {json.dumps(value)}, as in {parent}: a recipe sets it unless it is given, too"
        for section, values in before.items()
        for key, value in values.items()
        if value not in (plain[section][key], after[section][key]) and (section, key) not in given
    ]


def affected(plans: Mapping[str, Any], name: str, dataset: str) -> Iterator[str]:
    """Yield one line each for what was made with the old content of a configuration that is replaced."""
    from nnunetv2_mstkd.nnunet.plans import heirs

    if others := heirs(plans, name):
        yield f"these inherit from it, and change as well in what they do not set themselves: {', '.join(others)}"
    results = Path(os.environ.get("nnUNet_results") or ".", dataset)
    if models := sorted(path.name for path in results.glob(f"*__{plans['plans_name']}__{name}")):
        yield f"trained with the old one, and no longer comparable with new folds: {', '.join(models)}"


def describe(entry: Mapping[str, Any]) -> list[str]:
    """Return the settings of a configuration that differ from the defaults, one line each."""
    from nnunetv2_mstkd.nnunet.plans import BLOCK
    from nnunetv2_mstkd.training.settings import known_sections

    known = known_sections()
    lines = [
        f"{section}.{key} = {json.dumps(value)}"
        for section, values in entry[BLOCK].items()
        for key, value in values.items()
        if section in known and value != known[section]().to_dict()[key]
    ]
    lines += [f"{key} = {entry[key]}" for key in ("patch_size", "batch_size") if key in entry]
    if "architecture" in entry:
        kwargs = entry["architecture"]["arch_kwargs"]
        lines.append(f"features_per_stage = {kwargs['features_per_stage']}, strides = {kwargs['strides']}")
    return lines
