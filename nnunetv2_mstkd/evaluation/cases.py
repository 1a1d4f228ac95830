"""Which cases an evaluation is about: those that a model was validated on, or a folder of images and labels."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.scoring import Rules, read_label
from nnunetv2_mstkd.evaluation.strips import View, choose_view
from nnunetv2_mstkd.images.geometry import TOLERANCE
from nnunetv2_mstkd.inference.checks import Checker, listed
from nnunetv2_mstkd.inference.input_folder import Case, find_cases
from nnunetv2_mstkd.modalities import modality_names
from nnunetv2_mstkd.nnunet.case_steps import preprocess_case
from nnunetv2_mstkd.nnunet.folders import nnunet_folder
from nnunetv2_mstkd.nnunet.model_folder import read_json

DATA_KEYS = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "resampling_fn_data",
    "resampling_fn_data_kwargs",
)  # fmt: skip
"""What preprocessed data depend on."""


@dataclass(frozen=True)
class LabelledCase:
    """A case to evaluate.

    Attributes
    ----------
    name:
        its identifier.
    fold:
        whose weights predict it, as text.
    label:
        file of the reference.
    preprocessed:
        folder of nnU-Net's preprocessed data; None: the images are preprocessed now.
    images:
        files per channel, where ``preprocessed`` is None.
    """

    name: str
    fold: str
    label: Path
    preprocessed: Path | None = None
    images: Case | None = None


def prepare(
    case: LabelledCase,
    absent: Sequence[int],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
) -> tuple[np.ndarray, dict]:
    """The network's input: float32, shape (C, *spatial), and the properties for nnU-Net's exporter.

    Parameters
    ----------
    absent:
        channels that are removed before preprocessing; only for a case with images.
    """
    if case.images is not None:
        return preprocess_case(case.images.without(absent), plans, configuration, dataset_json, False)
    folder = str(case.preprocessed)
    data, _, _, properties = infer_dataset_class(folder)(folder, [case.name]).load_case(case.name)
    # the exporter needs no list of foreground voxels, which is large
    properties = {key: value for key, value in properties.items() if key != "class_locations"}
    return np.asarray(data[:], dtype=np.float32), properties


# ---- validation folds ----------------------------------------------------------------------------------------------


def validation_cases(
    model_folder: Path,
    fold: int | str,
    split: Mapping[str, Sequence[str]] | None,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
    *,
    from_images: bool = False,
) -> list[LabelledCase]:
    """The validation cases of a fold.

    Parameters
    ----------
    model_folder:
        of the trained model, for messages.
    fold:
        number or ``"all"``.
    split:
        what the checkpoint says that it was trained and validated on; None: it says nothing, and
        ``splits_final.json`` decides.
    from_images:
        take the images of nnUNet_raw instead of the preprocessed data.

    Raises
    ------
    FileNotFoundError, ValueError
        if the fold has no validation cases, or their data are not there or made by other plans.
    """
    folder = nnunet_folder("nnUNet_preprocessed") / plans.dataset_name
    data = folder / configuration.data_identifier
    names = _validation_names(model_folder, folder, data, fold, split)
    if not names:
        raise InputError(f"fold {fold} of {model_folder} has no validation cases")
    ending = dataset_json["file_ending"]
    labels = {name: folder / "gt_segmentations" / f"{name}{ending}" for name in names}
    if from_images:
        images = _raw_images(plans.dataset_name, dataset_json)
        missing = [name for name in names if name not in images]
        if missing:
            raise MissingFileError(f"no images of the validation case {missing[0]} in nnUNet_raw/{plans.dataset_name}")
        return [LabelledCase(name, str(fold), labels[name], images=images[name]) for name in names]
    if not data.is_dir():
        raise MissingFileError(f"no preprocessed data in {data}; {_preprocess(plans, configuration)}")
    _check_plans(folder / f"{plans.plans_name}.json", plans, configuration)
    there = set(_identifiers(data))
    missing = [name for name in names if name not in there]
    if missing:
        raise MissingFileError(
            f"no preprocessed data of the validation case {missing[0]} in {data} ({len(missing)} of {len(names)} "
            f"missing); {_preprocess(plans, configuration)}"
        )
    return [LabelledCase(name, str(fold), labels[name], preprocessed=data) for name in names]


def _validation_names(
    model_folder: Path, folder: Path, data: Path, fold: int | str, split: Mapping[str, Sequence[str]] | None
) -> list[str]:
    if split is not None:
        return sorted(split["val"])
    if fold == "all":
        return sorted(_identifiers(data))
    splits_file = folder / "splits_final.json"
    if not splits_file.is_file():
        raise MissingFileError(f"no validation cases of {model_folder}: {splits_file} does not exist")
    splits = _read_splits(splits_file)
    if int(fold) >= len(splits):
        raise InputError(f"no validation cases of fold {fold}: {splits_file} has the folds 0 to {len(splits) - 1}")
    return sorted(splits[int(fold)]["val"])


def _read_splits(file: Path) -> list[dict[str, list[str]]]:
    try:  # a list, and read_json is for tables
        splits = json.loads(file.read_text(encoding="utf-8"))
        return [{"val": [str(name) for name in split["val"]]} for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no list of splits of nnU-Net ({type(error).__name__}: {error})") from error


def _identifiers(data: Path) -> list[str]:
    try:
        return list(infer_dataset_class(str(data)).get_identifiers(str(data)))
    except (AssertionError, OSError, KeyError) as error:
        raise MissingFileError(f"{data} holds no preprocessed data of nnU-Net") from error


def _check_plans(file: Path, plans: PlansManager, configuration: ConfigurationManager) -> None:
    """Refuse data that other plans than the model's have made, where the plans beside the data tell."""
    if not file.is_file():
        return
    there = PlansManager(read_json(file))
    name = configuration.data_identifier
    changed = []
    for key in there.plans.get("configurations", {}):
        other = there.get_configuration(key).configuration
        if other.get("data_identifier") != name:
            continue
        keys = [key for key in DATA_KEYS if other.get(key) != configuration.configuration.get(key)]
        if there.transpose_forward != plans.transpose_forward:
            keys.append("transpose_forward")
        if not keys:
            return
        changed += keys
    if changed:
        raise InputError(
            f"{file} has another {changed[0]} than the plans that the model was trained with, so the preprocessed data "
            f"may not be the model's. Evaluate from the images: --mask-first, or -i IMAGES -l LABELS -o OUT"
        )


def _preprocess(plans: PlansManager, configuration: ConfigurationManager) -> str:
    number = int(plans.dataset_name[len("Dataset") :].split("_")[0])
    name = configuration.data_identifier.removeprefix(f"{plans.plans_name}_")
    return f"make them: nnUNetv2_preprocess -d {number} -plans_name {plans.plans_name} -c {name}"


def _raw_images(dataset: str, dataset_json: dict) -> dict[str, Case]:
    raw = nnunet_folder("nnUNet_raw") / dataset
    description = read_json(raw / "dataset.json")
    with contextlib.redirect_stdout(io.StringIO()):
        files = get_filenames_of_train_images_and_targets(str(raw), description)
    channels = len(modality_names(dataset_json))
    cases = {}
    for name, entry in files.items():
        images = tuple(Path(path) for path in entry["images"])
        absent = next((path for path in images if not path.is_file()), None)
        if len(images) != channels or absent is not None:
            raise MissingFileError(
                f"{raw}: case {name} has {len(images)} images, expected {channels}"
                if absent is None
                else f"the image {absent} of case {name} does not exist"
            )
        cases[name] = Case(str(name), images)
    return cases


# ---- a folder ------------------------------------------------------------------------------------------------------


def folder_cases(
    images: Path, labels: Path, fold: str, dataset_json: dict, names: Sequence[str], available: Sequence[int]
) -> list[LabelledCase]:
    """The cases of a folder of images, each with a label of the same name.

    Parameters
    ----------
    images, labels:
        folders with ``CASE_000k`` and ``CASE`` files.
    fold:
        whose weights predict them.
    names:
        of the C channels.
    available:
        channels that every case must have; the files of others are not looked at.

    Raises
    ------
    FileNotFoundError, ValueError
        with all problems: no images, absent modalities, absent labels.
    """
    if not labels.is_dir():
        raise MissingFileError(f"no folder of labels {labels}")
    ending = dataset_json["file_ending"]
    cases, problems = find_cases(images, ending, names)
    if problems:
        raise InputError(f"the images in {images} are not as expected:{listed(problems)}")
    others = [channel for channel in range(len(names)) if channel not in available]
    for case in cases:
        absent = [names[channel] for channel in available if case.files[channel] is None]
        if absent:
            raise MissingFileError(
                f"{images} has no {' and no '.join(absent)} of case {case.name}; evaluate only what is there: "
                f"--available {','.join(names[channel] for channel in available if case.files[channel] is not None)}"
            )
    missing = [case.name for case in cases if not (labels / f"{case.name}{ending}").is_file()]
    if missing:
        raise MissingFileError(
            f"{labels} has no label {missing[0]}{ending} ({len(missing)} of {len(cases)} cases have none)"
        )
    return [
        LabelledCase(case.name, fold, labels / f"{case.name}{ending}", images=case.without(others)) for case in cases
    ]


# ---- checks before the network runs --------------------------------------------------------------------------------


def check_cases(
    cases: Iterable[LabelledCase],
    plans: PlansManager,
    rules: Rules,
    names: Sequence[str],
    *,
    threads: int = 1,
    progress: bool = False,
) -> dict[tuple[str, str], View]:
    """Read all labels, and all images that are not preprocessed yet.

    Returns
    -------
    The slice of each case to show, by fold and name.

    Raises
    ------
    FileNotFoundError, ValueError
        for the first case, in their order, with a file that cannot be read, a label with unknown values, or a label
        that does not lie where its image lies.
    """
    cases = list(cases)
    checker = Checker(names, plans.image_reader_writer_class)
    pool = ThreadPoolExecutor(max(1, threads))  # threads do: reading releases the interpreter's lock
    try:
        found = pool.map(lambda case: _check_case(case, plans, rules, checker), cases)
        views = list(tqdm(found, "checking", len(cases), unit="case", disable=not progress, leave=False))
    finally:
        pool.shutdown(cancel_futures=True)
    return {(case.fold, case.name): view for case, view in zip(cases, views, strict=True)}


def _check_case(case: LabelledCase, plans: PlansManager, rules: Rules, checker: Checker) -> View:
    label, properties = read_label(case.label, plans.image_reader_writer_class, rules.labels)
    if case.images is not None:
        checked, problems = checker.check(case.images)
        if problems:
            raise InputError(f"the images of {case.name} cannot be evaluated:{listed(problems)}")
        if checked.all_zero:
            raise InputError(
                f"{', '.join(checker.names[channel] for channel in checked.all_zero)} of case {case.name} is zero "
                f"everywhere, so it is absent; leave the case out, or evaluate only what is there with --available"
            )
        first = next(path for path in case.images.files if path is not None)
        image, image_properties = plans.image_reader_writer_class().read_images([str(first)])
        shape = image.shape[1:]
    else:
        image_properties = _properties(case)
        size = image_properties["shape_before_cropping"]
        shape = tuple(int(size[axis]) for axis in plans.transpose_backward)
    differences = []
    if label.shape != tuple(shape):
        differences.append(f"shape {label.shape}, the image {tuple(shape)}")
    else:
        for key, mine, theirs in _placements(properties, image_properties):
            if len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=0, atol=TOLERANCE):
                differences.append(f"{key} {_short(mine)}, the image {_short(theirs)}")
    if differences:
        raise InputError(f"the label {case.label} does not lie where its image lies: it has {'; '.join(differences)}")
    return choose_view(label, properties["spacing"], rules.ignore_label)


def _properties(case: LabelledCase) -> dict:
    folder = str(case.preprocessed)
    return infer_dataset_class(folder)(folder, [case.name]).load_case(case.name)[-1]


def _placements(label: Mapping[str, Any], image: Mapping[str, Any]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What is known of the place of both: spacing always, origin and direction or affine where the reader has them."""
    found = [("spacing", label["spacing"], image["spacing"])]
    for group in ("sitk_stuff", "nibabel_stuff"):
        mine, theirs = label.get(group, {}), image.get(group, {})
        found += [
            (key.replace("_", " "), mine[key], theirs[key])
            for key in ("origin", "direction", "original_affine")
            if key in mine and key in theirs
        ]
    return [(key, np.ravel(mine).astype(float), np.ravel(theirs).astype(float)) for key, mine, theirs in found]


def _short(values: np.ndarray) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"
