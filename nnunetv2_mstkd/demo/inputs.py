"""Test inputs with missing modalities for stock nnUNetv2_predict, which needs zero images."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk
import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.images.atomic import atomic_folder

JOIN = "__"
"""Between case and subset in a file name: ``case__T1ce+FLAIR_0000.nii.gz``."""


def write_subset_inputs(images: Path, folder: Path, names: Sequence[str], subsets: torch.Tensor) -> list[str]:
    """Write every case of a folder once per subset, missing channels as zero images; return the names CASE__SUBSET.

    Parameters
    ----------
    images
        Folder of complete cases, ``CASE_000k.nii.gz``.
    folder
        Folder for ``CASE__SUBSET_000k.nii.gz``; it appears when it is complete, and is left as it is if it exists.
    names
        Names of the C channels.
    subsets
        Boolean tensor of shape (S, C).
    """
    cases = sorted(path.name.removesuffix("_0000.nii.gz") for path in images.glob("*_0000.nii.gz"))
    rows = {modalities.subset_name(row, names): row for row in subsets.tolist()}
    if not folder.is_dir():
        with atomic_folder(folder) as unfinished:
            for case, channel in itertools.product(cases, range(len(names))):
                source = images / f"{case}_{channel:04d}.nii.gz"
                zero = 0 * sitk.ReadImage(str(source))
                for subset, row in rows.items():
                    target = unfinished / f"{case}{JOIN}{subset}_{channel:04d}.nii.gz"
                    if row[channel]:
                        shutil.copyfile(source, target)
                    else:
                        sitk.WriteImage(zero, str(target), useCompression=True)
    return [f"{case}{JOIN}{subset}" for case in cases for subset in rows]
