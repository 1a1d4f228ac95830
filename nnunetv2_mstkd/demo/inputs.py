"""Test inputs with missing modalities for stock nnUNetv2_predict, which needs zero images."""

from __future__ import annotations

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
    """Write every case once per subset; missing channels become zero images.

    Parameters
    ----------
    images
        Folder of complete cases, ``CASE_000k.nii.gz``.
    folder
        Folder for ``CASE__SUBSET_000k.nii.gz``; it appears when it is complete.
    names
        Names of the C channels.
    subsets
        Boolean tensor of shape (S, C).

    Returns
    -------
    The names ``CASE__SUBSET`` in order.
    """
    cases = sorted(path.name[: -len("_0000.nii.gz")] for path in images.glob("*_0000.nii.gz"))
    identifiers = [f"{case}{JOIN}{modalities.subset_name(row, names)}" for case in cases for row in subsets.tolist()]
    if folder.is_dir():
        return identifiers
    with atomic_folder(folder) as unfinished:
        for case in cases:
            for channel in range(len(names)):
                source = images / f"{case}_{channel:04d}.nii.gz"
                image = sitk.ReadImage(str(source))
                zero = sitk.Image(image.GetSize(), image.GetPixelID())
                zero.CopyInformation(image)
                for row in subsets.tolist():
                    target = unfinished / f"{case}{JOIN}{modalities.subset_name(row, names)}_{channel:04d}.nii.gz"
                    if row[channel]:
                        shutil.copyfile(source, target)
                    else:
                        sitk.WriteImage(zero, str(target), useCompression=True)
    return identifiers
