"""The cases to evaluate: the validation cases of a fold, or a folder of images with a folder of labels.

A case may lack modalities; it is evaluated with the subsets of those that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.montage import SliceView, choose_view
from nnunetv2_mstkd.evaluation.scoring import Rules, read_label
from nnunetv2_mstkd.images.geometry import close, short_text
from nnunetv2_mstkd.inference.checks import Checker, format_problems
from nnunetv2_mstkd.inference.workers import in_threads, workers
from nnunetv2_mstkd.modalities import modality_names
from nnunetv2_mstkd.nnunet.case_facts import read_case_facts
from nnunetv2_mstkd.nnunet.folders import find_raw_folder, nnunet_folder
from nnunetv2_mstkd.nnunet.input_folder import Case, file_stamp, find_cases, training_cases
from nnunetv2_mstkd.nnunet.per_channel import PER_CHANNEL, complete_data, data_folder, normalization
from nnunetv2_mstkd.nnunet.preprocessing import (
    check_preprocessed_with,
    identifiers,
    preprocess_case,
    preprocess_command,
    read_preprocessed,
    read_properties,
)
from nnunetv2_mstkd.nnunet.splits import validation_cases


@dataclass(frozen=True)
class LabelledCase:
    """A case to evaluate, with its label; either it is preprocessed, or its images are during the evaluation."""

    name: str
    fold: str
    """The fold whose weights predict it, as text."""
    label: Path
    preprocessed: Path | None = None
    """Folder of nnU-Net's preprocessed data."""
    images: Case | None = None
    in_preprocessed: tuple[bool, ...] = ()
    """For each of the C channels, whether the preprocessed data have an image."""
    labelled: bool = True
    """False if its label is nothing but the ignore label; of a case with images it is known once it is checked."""

    @property
    def present(self) -> tuple[bool, ...]:
        """For each of the C channels, whether the case has an image; all-zero files count until it is checked."""
        return self.in_preprocessed if self.images is None else self.images.availability

    @property
    def given(self) -> tuple[bool, ...]:
        """As :attr:`present`, but all-zero files always count: what is known without reading images."""
        zero = () if self.images is None else self.images.all_zero
        return tuple(there or channel in zero for channel, there in enumerate(self.present))

    def stamps(self) -> dict[str, str]:
        """What tells the files that are read from those that replace them, without files that do not exist.

        Keys are ``label`` and channel numbers or the endings of preprocessed data: files of several folders may share
        their names.
        """
        files = {"label": self.label}
        if self.images is not None:
            files |= {f"{k:04d}": path for k, path in enumerate(self.images.files) if path is not None}
        elif self.preprocessed is not None:
            files |= {ending: self.preprocessed / f"{self.name}.{ending}" for ending in ("b2nd", "npz", "pkl")}
        return {key: stamp for key, path in files.items() if (stamp := file_stamp(path))}

    def subsets(self, rows: Mapping[str, Sequence[bool]]) -> list[str]:
        """The names of those subsets, by name bool of shape (C,), that the case has all modalities of."""
        return [name for name, row in rows.items() if not np.any(np.logical_and(row, np.logical_not(self.present)))]


def prepare(
    case: LabelledCase, absent: Sequence[int], plans: Any, configuration: Any, dataset_json: dict
) -> tuple[np.ndarray, dict]:
    """The network's input, float32 of shape (C, *spatial), and the properties for nnU-Net's exporter.

    The channels ``absent`` are removed before preprocessing, which is possible for a case with images. The model is
    given by nnU-Net's plans manager and configuration manager, and the content of its dataset.json.
    """
    if case.images is not None:
        return preprocess_case(case.images.without(absent), plans, configuration, dataset_json, False)
    assert case.preprocessed is not None
    return read_preprocessed(case.preprocessed, case.name)


# ---- finding -------------------------------------------------------------------------------------------------------


def fold_cases(
    fold: int | str,
    split: Mapping[str, Sequence[str]] | None,
    plans: Any,
    configuration: Any,
    dataset_json: dict,
    *,
    from_images: bool = False,
    processes: int = 0,
    report: Callable[[str], None] = print,
) -> list[LabelledCase]:
    """The validation cases of a fold, a number or ``"all"``.

    Parameters
    ----------
    split:
        The split that the checkpoint notes; None: it notes none, and ``splits_final.json`` decides.
    plans, configuration, dataset_json:
        The model, as for :func:`prepare`.
    from_images:
        Take the images in nnUNet_raw instead of the preprocessed data.
    processes:
        Number of background processes that make preprocessed data which a ``per_channel`` model lacks.
    report:
        Gets a line if the preprocessed data have to be made, or read to see which modalities the cases have.

    Raises
    ------
    MissingFileError, InputError
        If the fold has no validation cases, a case has no modality, or their data do not exist or were made with other
        plans.
    """
    folder = nnunet_folder("nnUNet_preprocessed") / plans.dataset_name
    data = folder / configuration.data_identifier
    names = validation_cases(folder, data, fold, split)
    data = data_folder(folder, configuration)
    labels = {name: folder / "gt_segmentations" / f"{name}{dataset_json['file_ending']}" for name in names}
    channels = modality_names(dataset_json)
    if from_images:
        raw = nnunet_folder("nnUNet_raw") / plans.dataset_name
        images = training_cases(raw, len(channels))
        missing = [name for name in names if name not in images]
        if missing:
            raise MissingFileError(f"no images of the validation case {missing[0]} in nnUNet_raw/{raw.name}")
        return [LabelledCase(name, str(fold), labels[name], images=images[name]) for name in names]
    # first: data made with other plans would look current to a later training
    check_preprocessed_with(folder / f"{plans.plans_name}.json", plans, configuration)
    if normalization(configuration) == PER_CHANNEL:
        raw_folder = find_raw_folder(plans.dataset_name)
        pool = partial(workers, processes)
        complete_data(folder, raw_folder, names, plans, configuration, dataset_json, pool=pool, log=report)
    if not data.is_dir():
        raise MissingFileError(f"no preprocessed data in {data}; make them: {preprocess_command(plans, configuration)}")
    missing = sorted(set(names) - set(identifiers(data)))
    if missing:
        raise MissingFileError(
            f"no preprocessed data of the validation case {missing[0]} in {data} ({len(missing)} of {len(names)} "
            f"missing); make them: {preprocess_command(plans, configuration)}"
        )
    facts = read_case_facts(data, names, dataset_json, channels, report)
    return [
        LabelledCase(
            name, str(fold), labels[name], data, in_preprocessed=facts[name].present, labelled=facts[name].labelled
        )
        for name in names
    ]


def folder_cases(
    images: Path, labels: Path, fold: str, dataset_json: dict, names: Sequence[str], available: Sequence[int]
) -> list[LabelledCase]:
    """The cases of a folder of ``CASE_000k`` images, each with a label ``CASE``.

    Parameters
    ----------
    fold:
        The fold whose weights predict the cases.
    names:
        Names of the C channels.
    available:
        Channels to use; files of other channels are ignored, and a case may lack files.

    Raises
    ------
    MissingFileError, InputError
        If there are no images, or a case lacks its label.
    """
    if not labels.is_dir():
        raise MissingFileError(f"no folder of labels {labels}")
    ending = dataset_json["file_ending"]
    cases, problems = find_cases(images, ending, names)
    if problems:
        raise InputError(f"the images in {images} are not as expected:{format_problems(problems)}")
    missing = [case.name for case in cases if not (labels / f"{case.name}{ending}").is_file()]
    if missing:
        raise MissingFileError(
            f"{labels} has no label {missing[0]}{ending} ({len(missing)} of {len(cases)} cases have none)"
        )
    others = [channel for channel in range(len(names)) if channel not in available]
    return [
        LabelledCase(case.name, fold, labels / f"{case.name}{ending}", images=case.without(others)) for case in cases
    ]


# ---- checking ------------------------------------------------------------------------------------------------------


def check_cases(
    cases: Sequence[LabelledCase],
    plans: Any,
    rules: Rules,
    names: Sequence[str],
    *,
    threads: int = 1,
    progress: bool = False,
) -> list[tuple[LabelledCase, SliceView | None]]:
    """Read all labels, and all images that are not preprocessed yet, before the network runs.

    Returns
    -------
    Each case without its all-zero images and with what its label says, and its slice to show: None without any image.

    Raises
    ------
    MissingFileError, InputError
        For the first case with a file that cannot be read, a label with unknown values, or a label that does not lie
        where its image lies.
    """
    checker = Checker(names, plans.image_reader_writer_class)
    return in_threads(lambda case: _check_case(case, plans, rules, checker), cases, threads, progress=progress)


def _check_case(
    case: LabelledCase, plans: Any, rules: Rules, checker: Checker
) -> tuple[LabelledCase, SliceView | None]:
    label, properties = read_label(case.label, plans.image_reader_writer_class, rules.labels)
    if case.images is None:
        assert case.preprocessed is not None
        image = read_properties(case.preprocessed, case.name)
        shape = tuple(int(image["shape_before_cropping"][axis]) for axis in plans.transpose_backward)
    else:
        images = _check_images(case.images, checker)
        labelled = rules.ignore_label is None or bool((label != rules.ignore_label).any())
        case = replace(case, images=images, labelled=labelled)
        if not any(case.present):
            return case, None
        first = next(path for path in images.files if path is not None)
        data, image = plans.image_reader_writer_class().read_images([str(first)])
        shape = data.shape[1:]
    if label.shape != shape:
        differences = [f"shape {label.shape}, the image {shape}"]
    else:
        differences = [
            f"{key} {short_text(mine)}, the image {short_text(theirs)}"
            for key, mine, theirs in _placements(properties, image)
            if len(mine) != len(theirs) or not close(mine, theirs)
        ]
    if differences:
        raise InputError(f"the label {case.label} is not on the grid of its image: it has {'; '.join(differences)}")
    return case, choose_view(label, properties["spacing"], rules.ignore_label)


def _check_images(case: Case, checker: Checker) -> Case:
    """The case without its all-zero images."""
    checked, problems = checker.check(case)
    if problems and any(checked.availability):
        raise InputError(f"the images of {case.name} cannot be evaluated:{format_problems(problems)}")
    return checked


def _placements(label: Mapping[str, Any], image: Mapping[str, Any]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What is known of the place of both: spacing always, origin and direction or affine if the reader has them."""
    found = [("spacing", label["spacing"], image["spacing"])]
    for group in ("sitk_stuff", "nibabel_stuff"):
        mine, theirs = label.get(group, {}), image.get(group, {})
        found += [
            (key.replace("_", " "), mine[key], theirs[key])
            for key in ("origin", "direction", "original_affine")
            if key in mine and key in theirs
        ]
    return [(key, np.ravel(mine).astype(float), np.ravel(theirs).astype(float)) for key, mine, theirs in found]
