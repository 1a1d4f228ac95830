"""Writing zero images for absent channels, for stock ``nnUNetv2_predict``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.images.atomic import atomic_folder, complete_image, scratch_folder
from nnunetv2_mstkd.images.writing import write_on_grid_of
from nnunetv2_mstkd.inference.checks import Checker
from nnunetv2_mstkd.inference.selection import select
from nnunetv2_mstkd.nnunet.description import find_format
from nnunetv2_mstkd.nnunet.folders import refuse_same_folder
from nnunetv2_mstkd.nnunet.input_folder import Case, Problem
from nnunetv2_mstkd.nnunet.reading import Channel, Reader, read_checked, read_grid

THREADS = 2


class FilledFolder(NamedTuple):
    """What was written: the cases, each with this number of channels, and how many images are zero."""

    cases: list[Case]
    channels: int
    zeros: int
    problems: list[Problem]


def fill_missing(
    images: Path,
    output: Path,
    *,
    dataset: str | None = None,
    model: Path | None = None,
    drop: str | None = None,
    skip_bad: bool = False,
    link: bool = False,
    progress: bool = False,
) -> FilledFolder:
    """Copy an input folder and add a zero image for every absent modality.

    Parameters
    ----------
    images
        Folder of ``CASE_000k`` files, any of which may be absent; only read.
    output
        New or empty folder, because nnU-Net takes every file in it for a channel; it appears when it is complete.
    dataset, model
        Number or name of the data set, or the folder of a trained model.
    drop
        Modalities to treat as absent, for example ``T1ce,FLAIR``.
    skip_bad
        Leave bad cases out instead of refusing all.
    link
        Make symbolic links instead of copies of the images.
    """
    refuse_same_folder(output, images, "input folder")
    dataset_json, reader = find_format(dataset, model)
    ending, names = dataset_json["file_ending"], modalities.modality_names(dataset_json)
    checker = Checker(names, reader)
    selection = select(
        images, ending, checker, drop=drop, skip_bad=skip_bad, threads=THREADS, progress=progress, verb="written"
    )
    with atomic_folder(output) as folder:
        cases = tqdm(selection.cases, "filling", unit="case", disable=not progress)
        zeros = sum(_fill_case(case, folder, reader, ending, link) for case in cases)
    return FilledFolder(selection.cases, len(names), zeros, selection.problems)


def _fill_case(case: Case, folder: Path, reader: Reader, file_ending: str, link: bool) -> int:
    """Write all channels of a case and return how many of them are zero images."""
    first = next(path for path in case.files if path is not None)
    reference = read_checked(first, reader)
    sidecar = first.with_name(f"{case.name}.json")  # nnU-Net's 3-D TIFF reader looks for the spacing there
    if sidecar.is_file():
        shutil.copyfile(sidecar, folder / sidecar.name)
    absent = []
    for channel, path in enumerate(case.files):
        target = folder / f"{case.name}_{channel:04d}{file_ending}"
        if path is None:
            absent.append(target)
            continue
        own = read_grid(path, reader)
        if own is not None and not np.allclose(own.spacing, reference.grid.spacing):
            write_on_grid_of(first, path, target)  # nnU-Net's reader stops where roundings differ that much
        elif link:
            target.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target)
    if absent:
        _write_zeros(reference, absent, reader)
    return len(absent)


def _write_zeros(reference: Channel, targets: Sequence[Path], reader: Reader) -> None:
    """Write the same zero image, on the grid of a channel, to several files."""
    with scratch_folder(targets[0]) as scratch:  # the TIFF writer leaves a sidecar of its own
        zero = scratch / targets[0].name
        with complete_image(zero):
            reader().write_seg(np.zeros(reference.image.shape, np.uint8), str(zero), reference.properties)
        for target in targets:
            shutil.copyfile(zero, target)
