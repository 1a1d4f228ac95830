"""Tiny trees of each release with its own file names, label values, types and orientations, from the phantom."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunetv2_mstkd.dataset_conversion.releases import RELEASES
from nnunetv2_mstkd.phantom import make_case

# NIfTI affines (RAS) as in the releases' files
SRI24_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
MNI152_AFFINE = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
NATIVE_AFFINE = np.array([[-1.0, 0, 0, 117.3], [0, -1, 0, 88.2], [0, 0, 0.6, -61.5], [0, 0, 0, 1]])

PHANTOM_CLASSES = {"ED": 1, "NCR": 2, "ET": 3}
SUFFIXES = {"t1": 0, "t1ce": 1, "t2": 2, "flair": 3, "t1n": 0, "t1c": 1, "t2w": 2, "t2f": 3}


@cache
def patient(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, shape (4, x, y, z), and label, shape (x, y, z), with the phantom's values."""
    case = make_case(number, spacing=6.0)
    images, label = case.images.transpose(0, 3, 2, 1), case.label.transpose(2, 1, 0)
    return images, label


SHAPE = patient(0)[1].shape


def use_small_grids(patch: pytest.MonkeyPatch) -> None:
    """Let the releases' tables expect the phantom's number of voxels; all else stays as it is."""
    for name, release in RELEASES.items():
        if release.grid is not None:
            patch.setitem(RELEASES, name, replace(release, grid=replace(release.grid, size=SHAPE)))


def case_names(release: str) -> list[str]:
    """Four cases; where names tell the time point, the first two are of one patient."""
    return {
        "brats2018": ["Brats18_2013_10_1", "Brats18_CBICA_AAB_1", "Brats18_TCIA01_131_1", "Brats18_TCIA13_654_1"],
        "brats2019": ["BraTS19_2013_0_1", "BraTS19_CBICA_AAB_1", "BraTS19_TMC_06290_1", "BraTS19_TCIA01_131_1"],
        "brats2020": [f"BraTS20_Training_{number}" for number in ("001", "002", "354", "355")],
        "brats2021": [f"BraTS2021_{number:05d}" for number in (0, 2, 3, 5)],
        "fets2022": [f"FeTS2022_{number:05d}" for number in (0, 2, 3, 1341)],
        "fets2024": [f"FeTS2022_{number:05d}" for number in (0, 2, 3, 1341)],
        "msd_task01": [f"BRATS_{number:03d}" for number in (1, 2, 3, 484)],
    }.get(release) or [
        f"BraTS-{release.split('_')[1].upper()}-{name}" for name in ("00005-100", "00005-101", "00006-000", "00008-001")
    ]


def own_label(release: str, number: int) -> np.ndarray:
    """The phantom's label with the release's classes and values, uint8."""
    _, label = patient(number)
    classes = dict(RELEASES[release].classes)
    core = "NET" if "NET" in classes else "NCR"
    own = np.zeros_like(label)
    for phantom_class, value in PHANTOM_CLASSES.items():
        own[label == value] = classes[core if phantom_class == "NCR" else phantom_class]
    for extra in {"RC", "CC"} & set(classes):  # half of the core
        places = np.argwhere(own == classes[core])
        own[tuple(places[: len(places) // 2].T)] = classes[extra]
    return own


def write(path: Path, array: np.ndarray, affine: np.ndarray, *, sform: bool = True) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine if sform else None, code=1 if sform else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def affine_of(release: str) -> np.ndarray:
    grid = RELEASES[release].grid
    return NATIVE_AFFINE if grid is None else MNI152_AFFINE if grid.name == "MNI152" else SRI24_AFFINE


def case_folder(source: Path, release: str, name: str) -> Path:
    """Where the release keeps the files of a case."""
    if release in ("brats2018", "brats2019"):
        return source / ("LGG" if "2013" in name else "HGG") / name
    if release == "brats2020":
        return source / "MICCAI_BraTS2020_TrainingData" / name
    return source / name


def make_release(source: Path, release: str) -> list[str]:
    """Write four cases as the release has them and return their names."""
    names = case_names(release)
    affine = affine_of(release)
    for number, name in enumerate(names):
        images, own = patient(number)[0], own_label(release, number)
        if release == "msd_task01":
            order = [images[channel] for channel in (3, 0, 1, 2)]  # FLAIR, T1w, T1gd, T2w
            write(source / "imagesTr" / f"{name}.nii.gz", np.stack(order, -1), affine)
            write(source / "labelsTr" / f"{name}.nii.gz", own, affine)
            continue
        folder = case_folder(source, release, name)
        hyphens = release.startswith("brats202") and release >= "brats2023"
        suffixes = ("t1n", "t1c", "t2w", "t2f") if hyphens else ("t1", "t1ce", "t2", "flair")
        separator = "-" if hyphens else "_"
        ending = ".nii" if release in ("brats2018", "brats2020") else ".nii.gz"
        sform = release != "brats2024_gli" or number % 2 == 0
        for suffix in suffixes:
            image = images[SUFFIXES[suffix]].astype(np.int16)
            write(folder / f"{name}{separator}{suffix}{ending}", image, affine, sform=sform)
        label = f"{name}{separator}seg{ending}"
        if name == "BraTS20_Training_355":
            label = "W39_1998.09.19_Segm.nii"
        stored = own.astype(np.float32) if release == "brats2023_gli" else own
        write(folder / label, stored, affine, sform=sform)
    if release == "msd_task01":
        channels = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
        (source / "dataset.json").write_text(json.dumps({"name": "BRATS", "modality": channels}))
        (source / "imagesTr" / f"._{names[0]}.nii.gz").write_bytes(b"of another system")
        write(source / "imagesTs" / "BRATS_485.nii.gz", np.stack([*patient(0)[0]], -1), affine)
    if release.startswith("fets"):
        (source / "partitioning_1.csv").write_text(
            "Partition_ID,Subject_ID\n" + "".join(f"{number % 2},{name}\n" for number, name in enumerate(names))
        )
    return names
