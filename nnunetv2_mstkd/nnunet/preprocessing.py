"""What nnU-Net does with one case before and after the network.

Background processes import this module, so it imports no more than they need.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy import ndimage

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import complete_image, read_json, scratch_folder
from nnunetv2_mstkd.images.names import utf8_name
from nnunetv2_mstkd.nnunet.entropy import case_entropy, entropy_map
from nnunetv2_mstkd.nnunet.folders import dataset_number
from nnunetv2_mstkd.nnunet.input_folder import Case
from nnunetv2_mstkd.nnunet.per_channel import preprocessor
from nnunetv2_mstkd.nnunet.reading import Reader

DATA_KEYS = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "resampling_fn_data",
    "resampling_fn_data_kwargs",
)  # fmt: skip
"""Entries of a configuration that preprocessed data depend on."""

# ---- before the network --------------------------------------------------------------------------------------------


def read_case(case: Case, reader: Reader) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the images of a case as nnU-Net does, with zeros for its absent channels.

    Returns
    -------
    Array of float32, shape (C, x, y, z), and the reader's properties of the first image, whose geometry the
    segmentation gets.
    """
    data, first = None, {}
    for channel, path in enumerate(case.files):
        if path is None:
            continue
        # one by one: nnU-Net's readers demand that the spacings of several files are equal to the last bit
        image, properties = reader().read_images([str(path)])
        if data is None:
            data, first = np.zeros((len(case.files), *image.shape[1:]), np.float32), properties
        data[channel] = image[0]
    if data is None:
        raise InputError(f"{case.name} has no modality")
    return data, first


def preprocess_case(
    case: Case,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: Mapping[str, Any],
    verbose: bool = False,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Read and preprocess a case as its plans say: float32 (C, *spatial), and what nnU-Net's exporter needs."""
    data, properties = read_case(case, plans.image_reader_writer_class)
    data, _, properties = preprocessor(configuration, verbose=verbose).run_case_npy(
        data, None, properties, plans, configuration, dataset_json
    )
    return data.astype(np.float32, copy=False), properties


def identifiers(folder: Path) -> list[str]:
    """Return the names of the cases in a folder of preprocessed data."""
    try:
        return list(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (AssertionError, OSError, KeyError) as error:
        raise MissingFileError(f"{folder} holds no preprocessed data of nnU-Net") from error


def read_preprocessed(folder: Path, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a preprocessed case: float32 of shape (C, *spatial), and what nnU-Net's exporter needs."""
    data, _, _, properties = infer_dataset_class(str(folder))(str(folder), [name]).load_case(name)
    properties.pop("class_locations", None)  # a large list of foreground voxels, for training only
    return np.asarray(data[:], dtype=np.float32), properties


def read_properties(folder: Path, name: str) -> dict[str, Any]:
    """Read the properties of a preprocessed case, without its voxels."""
    return infer_dataset_class(str(folder))(str(folder), [name]).load_case(name)[-1]


def check_preprocessed_with(file: Path, plans: PlansManager, configuration: ConfigurationManager) -> None:
    """Refuse preprocessed data if the plans file beside them differs from the model's in what the data depend on.

    If ``file`` does not exist, nothing is known.
    """
    if not file.is_file():
        return
    found = PlansManager(read_json(file))
    changed: list[str] = []
    for name in found.plans.get("configurations", {}):
        other = found.get_configuration(name).configuration
        if other.get("data_identifier") != configuration.data_identifier:
            continue
        keys = [key for key in DATA_KEYS if other.get(key) != configuration.configuration.get(key)]
        if found.transpose_forward != plans.transpose_forward:
            keys.append("transpose_forward")
        if not keys:
            return
        changed += keys
    if changed:
        raise InputError(
            f"{file} has another {changed[0]} than the plans that the model was trained with, so the preprocessed data "
            f"may not be the model's. Evaluate from the images: --mask-first, or -i IMAGES -l LABELS -o OUT"
        )


def preprocess_command(plans: PlansManager, configuration: ConfigurationManager) -> str:
    """Return the command that makes the preprocessed data of a configuration."""
    name = configuration.data_identifier.removeprefix(f"{plans.plans_name}_")
    number = dataset_number(plans.dataset_name)
    return f"nnUNetv2_preprocess -d {number} -plans_name {plans.plans_name} -c {name}"


# ---- after the network ---------------------------------------------------------------------------------------------


def segment(
    logits: np.ndarray,
    properties: Mapping[str, Any],
    plans: PlansManager,
    configuration: ConfigurationManager,
    labels: Any,
    *,
    threads: int = default_num_processes,
) -> np.ndarray:
    """Turn logits of the preprocessed image into labels of the original one, as nnU-Net's exporter does.

    Parameters
    ----------
    logits
        Array of shape (K, *spatial).
    properties
        From :func:`preprocess_case` or :func:`read_preprocessed`.
    labels
        nnU-Net's label manager of the model.
    threads
        How many torch uses for it.

    Returns
    -------
    Array of integers, shape (x, y, z) in the reader's axis order.
    """
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties, num_threads_torch=threads
    )


def keep_largest_component(segmentation: np.ndarray, labels: Any) -> np.ndarray:
    """The first step of nnU-Net's postprocessing: all foreground outside its largest component becomes background.

    ``segmentation`` has the shape (x, y, z), ``labels`` is nnU-Net's label manager; neighbours may share a corner only.
    Of equally large components all are kept. (nnU-Net's own function takes minutes for a hundred thousand islands.)

    Returns
    -------
    The segmentation itself if it has one component at most.
    """
    foreground = np.isin(segmentation, labels.foreground_labels)
    boxes = ndimage.find_objects(foreground.view(np.uint8))  # seven times as fast as in the whole image
    if not boxes:
        return segmentation
    parts, number = ndimage.label(foreground[boxes[0]], np.ones((3,) * foreground.ndim))
    if number == 1:
        return segmentation
    sizes = np.bincount(parts.ravel())
    smaller = sizes < sizes[1:].max()
    kept = segmentation.copy()
    kept[boxes[0]][(parts > 0) & smaller[parts]] = 0
    return kept


def probabilities(
    logits: np.ndarray,
    properties: Mapping[str, Any],
    plans: PlansManager,
    configuration: ConfigurationManager,
    labels: Any,
    temperature: float = 1.0,
) -> np.ndarray:
    """Turn logits of the preprocessed image into the probabilities of nnU-Net's ``.npz`` files: (K, x, y, z)."""
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        scaled(logits, temperature), plans, configuration, labels, properties, return_probabilities=True
    )[1]


def scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logits over a temperature, as they are at 1."""
    return logits if temperature == 1 else (logits / temperature).astype(logits.dtype)


def uncertainty(
    logits: np.ndarray,
    properties: Mapping[str, Any],
    plans: PlansManager,
    configuration: ConfigurationManager,
    labels: Any,
    temperature: float = 1.0,
) -> np.ndarray:
    """Entropy of each voxel of the original image in percent of its maximum: uint8, shape (x, y, z)."""
    found = probabilities(logits, properties, plans, configuration, labels, temperature)
    return in_percent(entropy_map(found, labels.has_regions))


def in_percent(fraction: np.ndarray) -> np.ndarray:
    """Return a map of 0 to 1 in percent: uint8."""
    return (100 * fraction).round().astype(np.uint8)


def as_original(
    values: np.ndarray, properties: Mapping[str, Any], plans: PlansManager, configuration: ConfigurationManager
) -> np.ndarray:
    """Bring a map of the preprocessed image, (*spatial), to the original one as nnU-Net does with logits: (x, y, z)."""
    shape = properties["shape_after_cropping_and_before_resampling"]
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    own = configuration.spacing
    current = own if len(own) == len(shape) else [spacing[0], *own]  # slices of a 2-D configuration keep theirs
    resampled = configuration.resampling_fn_probabilities(values[None], shape, current, spacing)
    whole = np.zeros(properties["shape_before_cropping"], np.float32)
    whole[_box(properties)] = np.asarray(resampled[0])
    return whole.transpose(plans.transpose_backward)


def as_preprocessed(image: np.ndarray, properties: Mapping[str, Any], plans: PlansManager) -> np.ndarray:
    """An image in the order of axes and the box in which nnU-Net decides about labels, before any resampling."""
    return image.transpose(plans.transpose_forward)[_box(properties)]


def _box(properties: Mapping[str, Any]) -> tuple[slice, ...]:
    """What cropping has kept of the transposed image."""
    return tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])


def export_case(
    name: str,
    output: Path,
    logits: np.ndarray,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
    plans: PlansManager,
    dataset_json: dict[str, Any],
    save_probabilities: bool,
    save_uncertainty: bool = False,
    temperature: float = 1.0,
    disagreement: np.ndarray | None = None,
    largest_component: bool = False,
) -> float | None:
    """Write a segmentation with nnU-Net's exporter; it appears complete or not at all.

    With ``save_uncertainty`` the entropy of each voxel is written to ``uncertainty/``, in percent of its maximum;
    ``disagreement``, shape (*spatial), 0 to 1, goes to ``disagreement/``, in percent. Saved entropies and probabilities
    are those of logits divided by ``temperature``; labels do not depend on it. ``largest_component`` applies
    :func:`keep_largest_component` to the labels. Maps and probabilities of an earlier prediction of the case that are
    not written again are deleted.

    Returns
    -------
    :func:`~nnunetv2_mstkd.nnunet.entropy.case_entropy`.
    """
    segmentation = name + dataset_json["file_ending"]
    labels = plans.get_label_manager(dataset_json)
    maps = {}
    if save_uncertainty:
        maps[UNCERTAINTY] = uncertainty(logits, properties, plans, configuration, labels, temperature)
    if disagreement is not None:
        maps[DISAGREEMENT] = in_percent(as_original(disagreement, properties, plans, configuration).clip(0, 1))
    for folder in {UNCERTAINTY, DISAGREEMENT} - set(maps):
        (output / folder / segmentation).unlink(missing_ok=True)
    for folder, percent in maps.items():
        (output / folder).mkdir(exist_ok=True)
        write_segmentation(percent, properties, plans.image_reader_writer_class, output / folder / segmentation)
    with scratch_folder(output / name) as scratch:
        rest = properties, configuration, plans, dataset_json, str(scratch / name)
        calibrated = save_probabilities and temperature != 1
        if calibrated:  # rounded, these logits may give other labels, which are written over
            export_prediction_from_logits(scaled(logits, temperature), *rest, True)
        with complete_image(scratch / segmentation):
            export_prediction_from_logits(logits, *rest, save_probabilities and not calibrated)
            if largest_component:
                reader, written = plans.image_reader_writer_class(), str(scratch / segmentation)
                values, geometry = reader.read_seg(written)
                reader.write_seg(keep_largest_component(values[0], labels), written, geometry)
        if not save_probabilities:
            for ending in (".npz", ".pkl"):
                (output / f"{name}{ending}").unlink(missing_ok=True)
        # the segmentation last: it says that the case is done
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == segmentation):
            os.replace(file, output / file.name)
    return case_entropy(logits, labels.has_regions)


UNCERTAINTY, DISAGREEMENT = "uncertainty", "disagreement"
"""Folders of the maps of entropy and of the disagreement of networks. Beside the segmentations nnU-Net would take the
maps for some."""


def check_ending(path: Path, reader: Reader) -> None:
    """Raise InputError unless nnU-Net's reader can write a file of this name."""
    utf8_name(path, "written")
    known = list(reader.supported_file_endings)  # type: ignore[attr-defined]
    if ".nii.gz" in known and ".nii" not in known:
        known.append(".nii")
    if not path.name.lower().endswith(tuple(known)):
        raise InputError(f"{path} has no ending that {reader.__name__} can write, which are {', '.join(known)}")


def write_segmentation(segmentation: np.ndarray, properties: Mapping[str, Any], reader: Reader, path: Path) -> None:
    """Write a segmentation with the geometry of its case, in any format that nnU-Net's reader knows."""
    check_ending(path, reader)
    with scratch_folder(path) as scratch:
        with complete_image(scratch / path.name):
            reader().write_seg(segmentation, str(scratch / path.name), dict(properties))
        for file in scratch.iterdir():  # the TIFF writer also writes a sidecar
            os.replace(file, path.with_name(file.name))
