"""Phantom cases as an nnU-Net raw data set."""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import complete_image, read_json, replace_folder, scratch_folder, write_json
from nnunetv2_mstkd.phantom.case import Case, check_arguments, make_case
from nnunetv2_mstkd.phantom.recipe import MODALITIES, REGIONS, get_recipe
from nnunetv2_mstkd.processes import default_workers

GENERATOR_VERSION = 1
"""Incremented when the same arguments give different images, so that old folders are not mistaken for new ones."""

RECORD = "phantom.json"
FILE_ENDING = ".nii.gz"
DISCLAIMER = "phantom numbers say nothing about clinical performance"


class Written(NamedTuple):
    """Outcome of `write_dataset`."""

    folder: Path
    new: bool


def write_dataset(
    folder_raw: Path | str,
    dataset_id: int,
    *,
    name: str = "Phantom",
    cases: int = 24,
    test_cases: int = 8,
    spacing: float = 2.0,
    recipe: str = "default",
    anatomy: str = "procedural",
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write ``DatasetXXX_name`` with imagesTr, labelsTr, imagesTs, labelsTs, dataset.json and phantom.json.

    A case depends only on the seed, its split and its number, not on the number of cases or workers. Training cases are
    called phantom_000, ..., test cases phantom_test_000, ...; the two never share a seed. The folder appears when it is
    complete: it is written under another name and renamed.

    Parameters
    ----------
    folder_raw
        nnU-Net's raw folder (``nnUNet_raw``); created if necessary.
    dataset_id, name
        Number of the data set, 1 to 999, and its name: letters, digits, ``_`` and ``-``.
    cases, test_cases
        Numbers of training (at least 1) and test cases (at least 0).
    spacing, recipe, anatomy, seed
        See :func:`nnunetv2_mstkd.phantom.make_case`.
    workers
        Number of processes; by default one per available core, at most 8. Processes are spawned, so a script needs the
        usual ``if __name__ == "__main__":``; 1 works in this process.
    progress
        Show a progress bar.
    overwrite
        Replace an existing folder that this function wrote; other data sets are never replaced.

    Returns
    -------
    The folder, and whether it was written now; if not, it already held exactly these cases.
    """
    check_arguments(spacing=spacing, recipe=recipe, anatomy=anatomy, seed=seed)
    if not 1 <= dataset_id <= 999:
        raise InputError(f"dataset id must be between 1 and 999, found {dataset_id}")
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise InputError(f"data set name must consist of letters, digits, '_' and '-', found {name!r}")
    if "__" in name:
        raise InputError(f"data set name must not have '__', at which nnU-Net splits names of results, found {name!r}")
    processes = default_workers() if workers is None else workers
    for what, found, least in (("cases", cases, 1), ("test cases", test_cases, 0), ("workers", processes, 1)):
        if found < least:
            raise InputError(f"{what} must be at least {least}, found {found}")

    folder_raw = Path(folder_raw)
    folder = folder_raw / f"Dataset{dataset_id:03d}_{name}"
    parameters = {
        "generator_version": GENERATOR_VERSION,
        "cases": cases,
        "test_cases": test_cases,
        "spacing": float(spacing),
        "anatomy": anatomy,
        "seed": seed,
        # through JSON, so that tuples compare equal to the lists read back
        "recipe": json.loads(json.dumps(asdict(get_recipe(recipe)))),
    }
    if folder.exists() and not (folder / RECORD).is_file():
        raise InputError(f"{folder} exists and was not written by mstkd phantom: choose another id with -d")
    if folder.exists() and not overwrite:
        _require_same(folder, parameters)
        return Written(folder, False)
    others = [p.name for p in folder_raw.glob(f"Dataset{dataset_id:03d}_*") if p != folder and p.is_dir()]
    if others:
        raise InputError(
            f"data set id {dataset_id} is taken by {others[0]} in {folder_raw}, and nnU-Net wants ids to be unique: "
            "choose another id with -d"
        )

    with scratch_folder(folder) as unfinished:
        volumes = _write_cases(unfinished, parameters, recipe, processes, progress)
        write_json(unfinished / RECORD, {"parameters": parameters, "cases": volumes})
        write_json(unfinished / "dataset.json", _dataset_json(name, cases, parameters))
        replace_folder(folder, unfinished)
    return Written(folder, True)


def read_record(folder: Path | str) -> dict:
    """Read phantom.json: ``parameters`` of the images and ``cases``, which maps each case to its volumes in ml."""
    return read_json(Path(folder) / RECORD, f": {folder} was not written by mstkd phantom")


def describe_volumes(folder: Path) -> list[str]:
    """A line per region with the distribution of its volumes."""
    cases = read_record(folder)["cases"].values()
    lines = []
    for region in REGIONS:
        values = [case[region] for case in cases]
        lines.append(
            f"{region}: median {statistics.median(values):.1f} ml, {min(values):.1f} to {max(values):.1f} ml, "
            f"absent in {values.count(0)} of {len(values)}"
        )
    return lines


def case_seed(seed: int, split: str, number: int) -> int:
    """Seed of one case: 128 bits, independent of the number of cases."""
    words = np.random.SeedSequence(seed, spawn_key=(("train", "test").index(split), number)).generate_state(4)
    return sum(int(word) << (32 * i) for i, word in enumerate(words))


def _require_same(folder: Path, parameters: dict) -> None:
    hint = "add --overwrite to replace it, or choose another id with -d"
    record = read_record(folder)
    for key, wanted in parameters.items():
        found = record["parameters"].get(key)
        if found != wanted:
            if key == "recipe":
                found, wanted = found["name"], wanted["name"]
                if found == wanted:
                    raise InputError(f"{folder} exists with other numbers in its recipe {found!r}: {hint}")
            raise InputError(f"{folder} exists with {key} {found!r}, asked for {wanted!r}: {hint}")
    for split, suffix in (("cases", "Tr"), ("test_cases", "Ts")):
        images, labels = (
            len(list((folder / f"{kind}{suffix}").glob(f"*{FILE_ENDING}"))) for kind in ("images", "labels")
        )
        if images != parameters[split] * len(MODALITIES) or labels != parameters[split]:
            raise InputError(
                f"{folder} should hold {parameters[split]} {split} and has {images} images and {labels} labels: {hint}"
            )


def _dataset_json(name: str, cases: int, parameters: dict) -> dict:
    return {
        "channel_names": {str(i): modality for i, modality in enumerate(MODALITIES)},
        "labels": {"background": 0, **{region: list(labels) for region, labels in REGIONS.items()}},
        "regions_class_order": [1, 2, 3],
        "numTraining": cases,
        "file_ending": FILE_ENDING,
        "name": name,
        "description": f"synthetic phantom, recipe {parameters['recipe']['name']}; {DISCLAIMER}",
    }


def _write_cases(
    folder: Path, parameters: dict, recipe: str, workers: int, progress: bool
) -> dict[str, dict[str, float]]:
    """Write the images and labels of all cases; return their volumes."""
    jobs = []
    for split, suffix, prefix in (("train", "Tr", "phantom_"), ("test", "Ts", "phantom_test_")):
        for kind in ("images", "labels"):
            (folder / f"{kind}{suffix}").mkdir(parents=True)
        for number in range(parameters["cases" if split == "train" else "test_cases"]):
            jobs.append((f"{prefix}{number:03d}", suffix, case_seed(parameters["seed"], split, number)))
    arguments = {"spacing": parameters["spacing"], "recipe": recipe, "anatomy": parameters["anatomy"]}
    work = partial(_write_case, folder, arguments)
    with ExitStack() as stack:
        run: Callable[..., Iterable] = map
        if workers > 1 and len(jobs) > 1:
            # spawn: a forked child of a process with running threads (torch, SimpleITK) may hang
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)).map
        volumes = list(tqdm(run(work, jobs), "phantom cases", len(jobs), disable=not progress))
    return {job[0]: volume for job, volume in zip(jobs, volumes, strict=True)}


def _write_case(folder: Path, arguments: dict, job: tuple[str, str, int]) -> dict[str, float]:
    identifier, suffix, seed = job
    case = make_case(seed, **arguments)
    for channel, image in enumerate(case.images):
        path = folder / f"images{suffix}" / f"{identifier}_{channel:04d}{FILE_ENDING}"
        _write_image(image, case, path)
    _write_image(case.label, case, folder / f"labels{suffix}" / f"{identifier}{FILE_ENDING}")
    return {region: round(volume, 3) for region, volume in case.volumes_ml().items()}


def _write_image(array: np.ndarray, case: Case, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([case.spacing] * 3)
    # SimpleITK's world is LPS: these two signs make the stored NIfTI affine RAS, diag(spacing)
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    x, y, z = case.origin
    image.SetOrigin((-x, -y, z))
    with complete_image(path):
        sitk.WriteImage(image, str(path), useCompression=True)
