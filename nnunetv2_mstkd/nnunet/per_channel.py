"""Setting ``input.normalization = "per_channel"``: each channel normalised as if its case had no other.

nnU-Net normalises all channels within one mask, the union of their non-zero voxels, or within one box around it. Where
those of the channels differ, the intensities of one depend on which others are there.
"""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd.errors import MissingFileError
from nnunetv2_mstkd.images.atomic import read_json, scratch_folder
from nnunetv2_mstkd.nnunet.folders import check_file_name
from nnunetv2_mstkd.nnunet.input_folder import TrainingFiles, training_files
from nnunetv2_mstkd.nnunet.plans import BLOCK

SECTION, KEY, PER_CHANNEL, PLANS = "input", "normalization", "per_channel", "plans"

_applied: ContextVar[bool] = ContextVar("per_channel_is_applied", default=False)


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Say that the networks built in the block get data that are normalised as their plans say."""
    token = _applied.set(True)
    try:
        yield
    finally:
        _applied.reset(token)


def warn_unless_applied(configuration: ConfigurationManager) -> None:
    """Warn if nnU-Net itself builds a network for prediction whose normalisation it does not have."""
    if normalization(configuration) == PER_CHANNEL and not _applied.get():
        warnings.warn(
            "this model was trained with input.normalization=per_channel, which nnU-Net's own prediction does not "
            "have: where the masks of the modalities differ, its segmentations are wrong. Use mstkd predict",
            stacklevel=2,
        )


class PerChannelPreprocessor(DefaultPreprocessor):
    """nnU-Net's preprocessor, whose channels do not see each other's masks; their common crop is nnU-Net's."""

    _normalized = False

    def run_case_npy(self, *args: Any, **kwargs: Any) -> Any:
        """As nnU-Net's; RuntimeError if that has not called :meth:`_normalize`, which is not part of its API."""
        self._normalized = False
        result = super().run_case_npy(*args, **kwargs)
        if not self._normalized:
            raise RuntimeError("this version of nnU-Net does not let input.normalization=per_channel take effect")
        return result

    def _normalize(
        self, data: np.ndarray, seg: np.ndarray, configuration_manager: Any, intensities: Mapping[str, Any]
    ) -> np.ndarray:
        """Normalise each channel within its own mask, as nnU-Net would if it were the only one; 0 outside of it."""
        self._normalized = True
        for channel, scheme in enumerate(configuration_manager.normalization_schemes):
            if not data[channel].any():  # absent
                continue
            alone, mask, box = crop_to_nonzero(data[channel : channel + 1].copy())
            only = SimpleNamespace(normalization_schemes=[scheme], use_mask_for_norm=[True])
            alone = super()._normalize(alone, mask, only, {"0": intensities[str(channel)]})
            there, data[channel] = data[channel] != 0, 0
            data[channel][bounding_box_to_slice(box)] = np.where(mask[0] >= 0, alone[0], 0)
            if not data[channel].any():  # of one value, such as a mask: 0 would say that it is absent
                data[channel] = there
        return data


def normalization(configuration: ConfigurationManager) -> str:
    """Return what a model's plans say: ``per_channel``, or ``plans`` for nnU-Net's own, and where they say nothing."""
    block = configuration.configuration.get(BLOCK)
    section = block.get(SECTION) if isinstance(block, Mapping) else None
    chosen = section.get(KEY) if isinstance(section, Mapping) else None
    return PER_CHANNEL if chosen == PER_CHANNEL else PLANS


def preprocessor(configuration: ConfigurationManager, *, verbose: bool = False) -> DefaultPreprocessor:
    """Return the preprocessor of a model's plans."""
    planned = configuration.preprocessor_class
    if normalization(configuration) == PER_CHANNEL:
        planned = type(planned.__name__, (PerChannelPreprocessor, planned), {})
    return planned(verbose=verbose)


def data_folder(preprocessed: Path, configuration: ConfigurationManager) -> Path:
    """Return the folder of a model's preprocessed data below nnUNet_preprocessed/DatasetXXX_NAME."""
    name = check_file_name(configuration.data_identifier, "data_identifier")
    per_channel = normalization(configuration) == PER_CHANNEL
    return preprocessed / (f"{name}_{PER_CHANNEL}" if per_channel else name)


def drop_removed(
    preprocessed: Path,
    cases: Sequence[str],
    configuration: ConfigurationManager,
    *,
    log: Callable[[str], None] = print,
) -> None:
    """Remove the data of ``per_channel`` of other cases than nnU-Net's own, which fold ``all`` would train on."""
    target = data_folder(preprocessed, configuration)
    there = {path.name.removesuffix(".b2nd") for path in target.glob("*.b2nd") if not path.stem.endswith("_seg")}
    removed = sorted(there - set(cases))
    for case in removed:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (target / f"{case}{ending}").unlink(missing_ok=True)
    if removed:
        log(f"removed from {target}, because nnU-Net's own folder no longer has them: {', '.join(removed)}")


def complete_data(
    preprocessed: Path,
    raw: Path | None,
    cases: Sequence[str],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    *,
    pool: Callable[[int], AbstractContextManager[Executor]],
    log: Callable[[str], None] = print,
) -> None:
    """Make the data that ``per_channel`` needs and that are not there, or are older than nnU-Net's own of the case.

    Parameters
    ----------
    preprocessed
        nnUNet_preprocessed/DatasetXXX_NAME.
    raw
        The data set's folder below nnUNet_raw; None if there is none.
    cases
        Names of the cases.
    pool
        Opens an executor, as a context, for a number of tasks.

    Raises
    ------
    MissingFileError
        If a case has to be made and its images do not exist.
    """
    source, target = preprocessed / configuration.data_identifier, data_folder(preprocessed, configuration)
    old = [case for case in cases if not _is_current(source / f"{case}.b2nd", target / f"{case}.b2nd")]
    if not old:
        return
    absent = [case for case in old if not (target / f"{case}.b2nd").is_file()]
    if raw is None and not absent:
        log(f"{target} has earlier times than {source.name}, as after a copy without times; it is used as it is")
        return
    what = f"{SECTION}.{KEY}={PER_CHANNEL}: {target} lacks {len(old)} of {len(cases)} cases, or they are too old"
    if raw is None:
        raise MissingFileError(
            f"{what}, which are made from the images in nnUNet_raw, but {plans.dataset_name} is not there; copy it "
            f"there, or set {SECTION}.{KEY}={PLANS}"
        )
    description, channels = read_json(raw / "dataset.json"), len(configuration.normalization_schemes)
    files = {case: training_files(raw, case, description, channels) for case in old}
    log(f"{what}; making them once from the images, next to nnU-Net's own")
    target.mkdir(exist_ok=True)
    with pool(len(old)) as executor:
        tasks = [
            executor.submit(_make_case, case, entry, target, plans, configuration, dataset_json)
            for case, entry in files.items()
        ]
        for task in tasks:
            task.result()


def _is_current(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    return not source.is_file() or target.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _make_case(
    case: str,
    files: TrainingFiles,
    target: Path,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
) -> None:
    """Preprocess one case; its images appear last, when everything else of it is there."""
    images = [str(path) for path in files.images]
    # trainings of several folds may start at the same time, on several machines
    with scratch_folder(target.parent / f"{target.name}_{case}_{platform.node()}_{os.getpid()}") as scratch:
        preprocessor(configuration).run_case_save(
            str(scratch / case), images, str(files.label), plans, configuration, dataset_json
        )
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == f"{case}.b2nd"):
            os.replace(file, target / file.name)
