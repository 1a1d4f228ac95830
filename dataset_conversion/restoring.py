"""Turn predictions back into the label values and file names of a release."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import complete_image
from nnunetv2_mstkd.images.completeness import check_complete
from nnunetv2_mstkd.images.geometry import geometry_of, read_image
from nnunetv2_mstkd.nnunet.folders import check_file_name
from nnunetv2_mstkd.nnunet.plans import CONVERSION

from .description import HIGHEST_LABEL
from .releases import RELEASES
from .slices import SLICE, write_masks

ET = "ET"


@dataclass(frozen=True)
class Restoration:
    """How to turn predictions back."""

    values: Mapping[int, int]  # of a prediction to different ones of the release
    label_file: str  # name of a segmentation, with {case}
    enhancing: int | None = None  # value of the enhancing tumor in a prediction; None if the data set has none
    small_et_becomes: int | None = None  # value of the class that replaces one that is too small

    @property
    def changes(self) -> str:
        """The values that change, for people."""
        return ", ".join(f"{value} -> {own}" for value, own in self.values.items() if value != own) or "none"


def restoration(dataset_json: Mapping[str, Any], release: str | None = None) -> Restoration:
    """Read from ``dataset.json`` how its predictions are turned back.

    Parameters
    ----------
    dataset_json
        From a data set that this package converted, or from a model trained on it.
    release
        Another release whose values and file names to write; classes are matched by name.

    Raises
    ------
    InputError
        If the data set was not converted by this package, two of its values became one, or `release` lacks a class.
    """
    record = dataset_json.get(CONVERSION)
    if not isinstance(record, Mapping):
        raise InputError("dataset.json does not say how the labels were converted: it is not of mstkd convert")
    classes = _values(record.get("classes", {}), "classes")
    enhancing, small = classes.get(ET), record.get("small_et_becomes")
    _values({} if small is None else {ET: small}, "small_et_becomes")
    if release is not None:
        target = RELEASES[release]
        lacking = [name for name in classes if name not in target.classes]
        if lacking or not classes:
            what = f"has no {', '.join(lacking)}" if lacking else "cannot be matched: the data set names no classes"
            raise InputError(f"{release} {what}; its classes are {', '.join(target.classes)}")
        values = {0: 0} | {value: target.classes[name] for name, value in classes.items()}
        return Restoration(values, target.label_file, enhancing, small)
    if "release_values" not in record:
        raise InputError("several values of the release became one in this data set, so there is no way back")
    values = {int(written): own for written, own in _values(record["release_values"], "release_values").items()}
    # the file may come from a stranger, and this name decides where the segmentations go
    label_file = check_file_name(record.get("label_file"), f"label_file in {CONVERSION} of dataset.json")
    if "{case}" not in label_file:
        raise InputError(f"label_file in {CONVERSION} of dataset.json is {label_file!r}, expected a name with {{case}}")
    return Restoration(values, label_file, enhancing, small)


def _values(table: Any, name: str) -> dict[str, int]:
    """A mapping to labels, and in ``release_values`` from labels, which are written as uint8; checked."""
    labels = [*table.values()] if isinstance(table, Mapping) else [None]
    if name == "release_values" and isinstance(table, Mapping):
        labels += [int(key) if re.fullmatch(r"\d{1,3}", str(key)) else None for key in table]
    if not all(type(label) is int and 0 <= label <= HIGHEST_LABEL for label in labels):
        raise InputError(
            f"{name} in {CONVERSION} of dataset.json is {table!r}, expected labels from 0 to {HIGHEST_LABEL}"
        )
    return dict(table)


def restore_folder(
    predictions: Path, output: Path, how: Restoration, *, ending: str, min_enhancing: int | None = None
) -> tuple[int, list[str]]:
    """Restore all predictions of a folder; return the number of restored files and a line for each that was left out.

    Parameters
    ----------
    predictions, output
        Folder of segmentations, which is only read, and folder for the restored ones, created if necessary.
    how
        From :func:`restoration`.
    ending
        File ending of the predictions.
    min_enhancing
        Post-processing: an enhancing tumor of fewer voxels becomes the class that the release's table names.
    """
    if min_enhancing is not None and min_enhancing < 1:
        raise InputError(f"--min-et is {min_enhancing}, expected at least 1")
    if min_enhancing is not None and (how.enhancing is None or how.small_et_becomes is None):
        raise InputError("--min-et: the data set has no class ET, or no class that replaces it")
    files = [path for path in sorted(predictions.glob(f"*{ending}")) if not path.name.startswith(".")]
    if not files:
        raise MissingFileError(f"no segmentation *{ending} in {predictions}")
    output.mkdir(parents=True, exist_ok=True)
    problems = []
    for path in files:
        case = path.name.removesuffix(ending)
        folder = output / case if SLICE in how.label_file else output
        target = folder / how.label_file.replace("{case}", case)
        try:
            restore_file(path, target, how, min_enhancing or 0)
        except ValueError as error:
            problems.append(f"{path.name} {error}")
    return len(files) - len(problems), problems


def restore_file(prediction: Path, target: Path, how: Restoration, min_enhancing: int = 0) -> None:
    """Write one prediction with the release's values atomically, and read it back to verify it.

    With :data:`.slices.SLICE` in its name, `target` names one file per slice.

    An InputError begins with a verb: the file cannot be read, has an unknown value, or differs when turned back. On a
    full disk it is a WriteError.
    """
    check_complete(prediction)
    image = read_image(prediction)
    stored = sitk.GetArrayFromImage(image)
    wrong = [f"{value:g}" for value in np.unique(stored).tolist() if value not in how.values]
    if wrong:
        raise InputError(f"holds {', '.join(wrong)}, expected the data set's values {sorted(how.values)}")
    segmentation = stored.astype(np.uint8)
    enhancing = segmentation == how.enhancing
    if 0 < np.count_nonzero(enhancing) < min_enhancing:
        segmentation[enhancing] = how.small_et_becomes
    if SLICE in target.name:
        write_masks(_mapped(segmentation, how.values), target)
        return
    restored = sitk.GetImageFromArray(_mapped(segmentation, how.values))
    restored.CopyInformation(image)
    unfinished = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with complete_image(unfinished):
            sitk.WriteImage(restored, str(unfinished), useCompression=True, imageIO="NiftiImageIO")
        back = {own: written for written, own in how.values.items()}
        again = read_image(unfinished)
        values = sitk.GetArrayFromImage(again)
        if not (
            set(np.unique(values).tolist()) <= set(back)
            and np.array_equal(_mapped(values, back), segmentation)
            and not geometry_of(image).differences(geometry_of(again))
        ):
            raise InputError("is not the same when turned into the data set's values again")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _mapped(values: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    table = np.zeros(256, np.uint8)
    table[list(mapping)] = list(mapping.values())
    return table[values]
