"""The data of `accuracy.py`: the phantom, or a converted data set of which some patients keep their labels."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from accuracy_rows import DATASET, DATASET_NAME, Preset
from label_noise import perturb

from nnunetv2_mstkd.dataset_conversion.splits import write_splits
from nnunetv2_mstkd.images.atomic import read_json, write_json
from nnunetv2_mstkd.phantom.dataset import write_dataset
from nnunetv2_mstkd.processes import command_path, default_workers

ALL, COMPLETE = "all", "complete"
"""In place of a number of labelled patients: those that neither validate nor test, or the complete ones of them."""


@dataclass(frozen=True)
class Parts:
    """Cases by their use. Unlabelled ones are trained on, with the ignore label everywhere."""

    test: list[str]
    validation: list[str]
    labelled: list[str]
    unlabelled: list[str]

    def __post_init__(self) -> None:
        lacking = [part.name for part in fields(self)[:3] if not getattr(self, part.name)]
        if lacking:
            raise ValueError(f"too few complete patients: none is left for the part {lacking[0]!r}")


def divide(source: Path, preset: Preset, labelled: str) -> Parts:
    """Divide the cases of a raw data set, in an order that ``preset.data_seed`` shuffles.

    Test, validation and labelled patients are drawn among the complete ones. Fewer labelled patients are among the
    more, and test and validation do not depend on their number.

    Raises
    ------
    ValueError
        if there are not enough, or for a number that is none.
    """
    channels = len(read_json(source / "dataset.json")["channel_names"])
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").glob("*.nii.gz"))
    complete = [case for case in cases if all(_measured(source, case, channel) for channel in range(channels))]
    incomplete = sorted({*cases} - {*complete})
    random.Random(preset.data_seed).shuffle(complete)
    first, second = preset.test_cases, preset.test_cases + preset.validation_cases
    rest, unlabelled = complete[second:], []
    if labelled == ALL:
        rest += incomplete
    elif labelled != COMPLETE:
        if not labelled.isdecimal() or int(labelled) > len(rest):
            raise ValueError(f"--labelled {labelled}: expected a number up to {len(rest)}, {ALL!r} or {COMPLETE!r}")
        rest, unlabelled = rest[: int(labelled)], rest[int(labelled) :] + incomplete
    return Parts(sorted(complete[:first]), sorted(complete[first:second]), sorted(rest), sorted(unlabelled))


def _measured(source: Path, case: str, channel: int) -> bool:
    image = sitk.ReadImage(str(source / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
    return bool(sitk.GetArrayViewFromImage(image).any())


def write_raw(source: Path, parts: Parts, raw: Path) -> None:
    """A raw data set of these parts: images are links; labels too, but those of unlabelled cases."""
    shutil.rmtree(raw, ignore_errors=True)
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (raw / folder).mkdir(parents=True)
    content = read_json(source / "dataset.json")
    content.pop("mstkd_conversion", None)
    ignore = 1 + max(int(max(np.atleast_1d(value))) for value in content["labels"].values())
    if parts.unlabelled:
        content["labels"]["ignore"] = ignore
    for part in fields(parts):
        end = "Ts" if part.name == "test" else "Tr"
        for case in getattr(parts, part.name):
            for image in source.glob(f"imagesTr/{case}_[0-9][0-9][0-9][0-9].nii.gz"):
                (raw / f"images{end}" / image.name).symlink_to(image.resolve())
            label, target = source / "labelsTr" / f"{case}.nii.gz", raw / f"labels{end}" / f"{case}.nii.gz"
            if part.name == "unlabelled":
                empty = sitk.Cast(sitk.ReadImage(str(label)) * 0 + ignore, sitk.sitkUInt8)
                sitk.WriteImage(empty, str(target))
            else:
                target.symlink_to(label.resolve())
    content["numTraining"] = len(parts.validation + parts.labelled + parts.unlabelled)
    write_json(raw / "dataset.json", content)


def make_data(out: Path, preset: Preset, source: Path | None, labelled: str) -> None:
    """Raw data, plans, preprocessed data and the split, as far as they are not there."""
    name = f"Dataset{DATASET:03d}_{DATASET_NAME}"
    raw, preprocessed = out / "raw" / name, out / "preprocessed" / name
    splits = preprocessed / "splits_final.json"
    if splits.is_file():  # the last thing that is written here
        return
    if source is None:
        write_dataset(
            out / "raw", DATASET, name=DATASET_NAME, cases=preset.training_cases + preset.validation_cases,
            test_cases=preset.test_cases, spacing=preset.spacing, recipe=preset.recipe, anatomy=preset.anatomy,
            seed=preset.data_seed, progress=True,
        )  # fmt: skip
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
        train, validation = cases[: preset.training_cases], cases[preset.training_cases :]
        labelled_cases = train
    else:
        if preset.label_noise:
            check_nested(read_json(source / "dataset.json")["labels"])
        parts = divide(source, preset, labelled)
        write_raw(source, parts, raw)
        train, validation = sorted(parts.labelled + parts.unlabelled), parts.validation
        labelled_cases = parts.labelled
    if preset.label_noise:
        _perturb_labels(raw, labelled_cases, preset)  # the ignore label of the others is no boundary
    print("plan and preprocess", flush=True)
    shutil.rmtree(preprocessed, ignore_errors=True)
    _plan(preset)
    write_splits([{"train": train, "val": validation}], splits)


def check_nested(labels: Mapping[str, int | list[int]]) -> None:
    """Raise ValueError unless each region holds all labels from a first one on, as ``label_noise.py`` needs them."""
    regions = [
        set(map(int, np.atleast_1d(value))) for name, value in labels.items() if name not in ("background", "ignore")
    ]
    last = max(map(max, regions))
    for region in regions:
        if region != set(range(min(region), last + 1)):
            raise ValueError(f"--label-noise needs one label, or regions that each hold the next one; labels: {labels}")


def _perturb_labels(raw: Path, cases: Sequence[str], preset: Preset) -> None:
    """Replace the links to the labels of these cases by perturbed labels."""
    for number, case in enumerate(cases):
        file = raw / "labelsTr" / f"{case}.nii.gz"
        noisy = perturb(
            sitk.ReadImage(str(file)), preset.label_noise, np.random.default_rng([preset.data_seed, number])
        )
        file.unlink()
        sitk.WriteImage(noisy, str(file))


def _plan(preset: Preset) -> None:
    workers = str(default_workers())
    words = [command_path("nnUNetv2_plan_and_preprocess"), "-d", str(DATASET), "-c", preset.configuration]
    words += ["-np", workers, "-npfp", workers]
    if preset.target_spacing:
        words += ["-overwrite_target_spacing", *map(str, preset.target_spacing)]
    subprocess.run(words, env={**os.environ, "nnUNet_def_n_proc": "1"}, check=True, stdout=subprocess.DEVNULL)
