"""Tiny trees of each release with its own file names, label values, types and orientations, from the phantom."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from nnunetv2_mstkd.dataset_conversion.releases import RELEASES
from nnunetv2_mstkd.phantom import make_case

# NIfTI affines (RAS) as in the releases' files
SRI24_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
MNI152_AFFINE = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
NATIVE_AFFINE = np.array([[-1.0, 0, 0, 117.3], [0, -1, 0, 88.2], [0, 0, 0.6, -61.5], [0, 0, 0, 1]])

PHANTOM_CLASSES = {"ED": 1, "NCR": 2, "ET": 3}

ENDINGS = {"brats2018": ".nii", "brats2020": ".nii"}
"""Releases that are not compressed."""


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
    """Four cases with names like the example's; if names tell the time point, the first two are of one patient."""
    example = RELEASES[release].example
    if release == "brats2015":  # the last two folders have the same name
        names = ("brats_tcia_pat153_0109", "brats_tcia_pat153_0181", "brats_2013_pat0001_1")
        return [*(f"HGG_{name}" for name in names), f"LGG_{names[-1]}"]
    match = re.fullmatch(RELEASES[release].case_names, example, re.ASCII)
    if "patient" not in match.groupdict():
        return [_renumbered(example, number) for number in (0, 2, 3, 355)]
    points = ((5, 100), (5, 101), (6, 0), (8, 1))
    return [
        _renumbered(match["patient"], who) + _renumbered(example[match.end("patient") :], when) for who, when in points
    ]


def _renumbered(name: str, number: int) -> str:
    """The name with another last number, as wide as before."""
    *_, last = re.finditer(r"\d+", name)
    return f"{name[: last.start()]}{number:0{len(last[0])}d}{name[last.end() :]}"


def own_label(release: str, number: int) -> np.ndarray:
    """The phantom's label with the release's classes and values, uint8."""
    _, label = patient(number)
    classes = dict(RELEASES[release].classes)
    core = "NET" if "NET" in classes else "NCR"
    own = np.zeros_like(label)
    for phantom_class, value in PHANTOM_CLASSES.items():
        own[label == value] = classes[core if phantom_class == "NCR" else phantom_class]
    for extra in classes.keys() - {"ED", core, "ET"}:  # half of the core
        places = np.argwhere(own == classes[core])
        own[tuple(places[: len(places) // 2].T)] = classes[extra]
    return own


def write(path: Path, array: np.ndarray, affine: np.ndarray, *, sform: bool = True) -> None:
    if path.suffix == ".mha":
        path.parent.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(array.T)
        image.SetOrigin((affine @ np.diag([-1, -1, 1, 1]))[:3, 3] * [-1, -1, 1])
        sitk.WriteImage(image, str(path))
        return
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
    if release == "brats2015":
        grade, _, folder = name.partition("_")
        return source / "BRATS2015_Training" / grade / folder
    if release in ("brats2018", "brats2019"):
        return source / ("LGG" if name.endswith("1") else "HGG") / name
    if release == "brats2020":
        return source / "MICCAI_BraTS2020_TrainingData" / name
    return source / name


def file_of(release: str, name: str, channel: int | None = None) -> str:
    """File name of an image, or of the label."""
    row = RELEASES[release]
    patterns = row.label if channel is None else list(row.modalities.values())[channel]
    if release == "brats2015":
        stem = f"VSD.Brain_3more.XX.O.OT.{42000 + sum(map(ord, name))}"
        if channel is not None:
            stem = f"VSD.Brain.XX.O.MR_{('T1', 'T1c', 'T2', 'Flair')[channel]}.{54000 + channel}"
        return f"{stem}/{stem}.mha" if name.startswith("HGG") else f"{stem}.mha"
    return patterns[0].replace("{case}", name).replace(".nii*", ENDINGS.get(release, ".nii.gz"))


def lgg_patient(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Slices as in LGG: images T1, FLAIR and T1ce, shape (z, y, x, 3), and masks of 0 and 255, both uint8."""
    images, label = patient(number)
    t1, t1ce, _, flair = np.clip(images.transpose(0, 3, 2, 1) / images.max() * 255, 0, 255).astype(np.uint8)
    return np.stack([t1, flair, t1ce], -1), np.where(label.transpose(2, 1, 0) > 0, 255, 0).astype(np.uint8)


def write_slices(folder: Path, images: np.ndarray, masks: np.ndarray | None) -> None:
    """Write slices as TIFF files that are named after the folder and numbered from 1."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images, start=1):
        tifffile.imwrite(folder / f"{folder.name}_{number}.tif", image)
    for number, mask in enumerate([] if masks is None else masks, start=1):
        tifffile.imwrite(folder / f"{folder.name}_{number}_mask.tif", mask)


def make_release(source: Path, release: str, names: list[str] | None = None) -> list[str]:
    """Write cases, by default four, as the release has them and return their names."""
    names = case_names(release) if names is None else names
    if RELEASES[release].slices:
        for number, name in enumerate(names):
            write_slices(source / "kaggle_3m" / name, *lgg_patient(number))
        (source / "kaggle_3m" / "data.csv").write_text("Patient;death01\n")
        return names
    affine = affine_of(release)
    for number, name in enumerate(names):
        images, own = patient(number)[0], own_label(release, number)
        if RELEASES[release].stack:
            order = [images[list(RELEASES[release].modalities).index(channel)] for channel in RELEASES[release].stack]
            write(source / "imagesTr" / f"{name}.nii.gz", np.stack(order, -1), affine)
            write(source / "labelsTr" / f"{name}.nii.gz", own, affine)
            continue
        folder = case_folder(source, release, name)
        sform = release != "brats2024_gli" or number % 2 == 0
        for channel, image in enumerate(images):
            write(folder / file_of(release, name, channel), image.astype(np.int16), affine, sform=sform)
        label = "W39_1998.09.19_Segm.nii" if name == "BraTS20_Training_355" else file_of(release, name)
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
