"""Writing zero images for the absent channels, for stock ``nnUNetv2_predict``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunetv2_mstkd.errors import ExistingFileError
from nnunetv2_mstkd.images.completeness import written_whole
from nnunetv2_mstkd.images.geometry import read_image
from nnunetv2_mstkd.inference.input_folder import Case
from nnunetv2_mstkd.nnunet.reading import read_checked, read_grid


def fill_folder(
    cases: Sequence[Case],
    output: Path,
    reader: type[BaseReaderWriter],
    file_ending: str,
    *,
    link: bool = False,
    progress: bool = False,
) -> int:
    """Write every case with one file per channel; the folder appears when it is complete.

    Parameters
    ----------
    cases:
        checked, with at least one image each.
    output:
        a folder that does not exist yet, or is empty.
    reader:
        nnU-Net's reader of the data set, which writes the zeros too.
    file_ending:
        of the data set.
    link:
        symbolic links instead of copies of the images.

    Returns
    -------
    Number of zero images written.

    Raises
    ------
    FileExistsError
        if the folder holds anything: nnU-Net takes every file in it for a channel.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExistingFileError(
            f"{output} is not empty, and nnU-Net would predict everything in it; choose a new folder"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        # a folder inside: the scratch folder itself is readable by its owner only
        unfinished = Path(scratch, "new")
        unfinished.mkdir()
        for case in tqdm(cases, "filling", unit="case", disable=not progress):
            written += _fill_case(case, unfinished, reader, file_ending, link)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    return written


def _fill_case(case: Case, folder: Path, reader: type[BaseReaderWriter], file_ending: str, link: bool) -> int:
    targets = [folder / f"{case.name}_{channel:04d}{file_ending}" for channel in range(len(case.files))]
    first = next(path for path in case.files if path is not None)
    reference = read_checked(first, reader)
    sidecar = first.with_name(f"{case.name}.json")  # nnU-Net's 3-D TIFF reader looks for the spacing there
    if sidecar.is_file():
        shutil.copyfile(sidecar, folder / sidecar.name)
    absent = [target for target, path in zip(targets, case.files, strict=True) if path is None]
    for target, path in zip(targets, case.files, strict=True):
        if path is None:
            continue
        own = read_grid(path, reader)
        if own is not None and not np.allclose(own.spacing, reference.grid.spacing):
            _write_on_grid_of(first, path, target)  # nnU-Net's reader stops where roundings differ that much
        elif link:
            target.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target)
    if absent:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # the TIFF writer leaves a sidecar of its own
            zero = Path(scratch, f"zero{file_ending}")
            with written_whole(zero):
                reader().write_seg(np.zeros(reference.image.shape, np.uint8), str(zero), reference.properties)
            for target in absent:
                shutil.copyfile(zero, target)
    return len(absent)


def _write_on_grid_of(reference: Path, path: Path, target: Path) -> None:
    image = read_image(path)
    image.CopyInformation(read_image(reference))
    with written_whole(target):
        sitk.WriteImage(image, os.fspath(target), useCompression=True)
