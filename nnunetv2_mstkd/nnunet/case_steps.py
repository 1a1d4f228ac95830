"""What happens to one case before and after the network; imported in background processes, so no more than needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import written_whole
from nnunetv2_mstkd.inference.input_folder import Case


def read_case(case: Case, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict]:
    """The images of a case as nnU-Net's reader gives them, with zeros for the absent channels.

    Parameters
    ----------
    case:
        checked, with at least one image.
    reader:
        nnU-Net's reader of the plans.

    Returns
    -------
    Array of float32, shape (C, x, y, z), and the properties of the first image that is there, which is the geometry
    that the segmentation gets.
    """
    there = [(channel, path) for channel, path in enumerate(case.files) if path is not None]
    data, first = None, {}
    for channel, path in there:
        # one by one: of several files nnU-Net's readers demand equal spacings to the last bit that is stored
        image, properties = reader().read_images([str(path)])
        if data is None:
            data, first = np.zeros((len(case.files), *image.shape[1:]), np.float32), properties
        data[channel] = image[0]
    if data is None:
        raise InputError(f"{case.name} has no modality")
    return data, first


def preprocess_case(
    case: Case, plans: PlansManager, configuration: ConfigurationManager, dataset_json: dict, verbose: bool
) -> tuple[np.ndarray, dict]:
    """Read a case and preprocess it as nnU-Net does: float32 (C, x, y, z), and the properties for its exporter."""
    data, properties = read_case(case, plans.image_reader_writer_class)
    preprocessor = configuration.preprocessor_class(verbose=verbose)
    data, _, properties = preprocessor.run_case_npy(data, None, properties, plans, configuration, dataset_json)
    return data.astype(np.float32, copy=False), properties


def export_case(
    name: str,
    output: Path,
    logits: np.ndarray,
    properties: dict,
    configuration: ConfigurationManager,
    plans: PlansManager,
    dataset_json: dict,
    save_probabilities: bool,
) -> None:
    """Write a segmentation with nnU-Net's exporter, into a hidden folder first: it appears whole or not at all.

    Raises
    ------
    OSError
        if the disk is full.
    """
    scratch = output / f".{name}.part"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        segmentation = name + dataset_json["file_ending"]
        with written_whole(scratch / segmentation):
            export_prediction_from_logits(
                logits, properties, configuration, plans, dataset_json, str(scratch / name), save_probabilities
            )
        # the segmentation last: it says that the case is done
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == segmentation):
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
