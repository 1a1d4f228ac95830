"""From predictions back to a release's own label values and file names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.dataset_conversion.description import HIGHEST_LABEL, RECORD_KEY
from nnunetv2_mstkd.dataset_conversion.releases import RELEASES
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import check_complete
from nnunetv2_mstkd.images.geometry import Geometry, geometry_of, read_image
from nnunetv2_mstkd.nnunet.file_names import check_file_name

ET = "ET"


@dataclass(frozen=True)
class Restoration:
    """How to turn predictions back.

    Attributes
    ----------
    values
        Value in a prediction -> value of the release; no two become one.
    label_file
        Name of a segmentation, with ``{case}``.
    enhancing, small_et_becomes
        Values in a prediction: the enhancing tumour, and what takes its place where it is too small; None where the
        data set has none.
    """

    values: Mapping[int, int]
    label_file: str
    enhancing: int | None = None
    small_et_becomes: int | None = None


def restoration(dataset_json: Mapping[str, Any], release: str | None = None) -> Restoration:
    """Read from ``dataset.json`` how its predictions are turned back.

    Parameters
    ----------
    dataset_json
        Of a data set that this package converted, or of a model trained on it.
    release
        Another release whose values and file names to write; classes are matched by name.

    Raises
    ------
    ValueError
        If the data set was not converted by this package, two of its values were one, or `release` lacks a class.
    """
    record = dataset_json.get(RECORD_KEY)
    if not isinstance(record, Mapping):
        raise InputError("dataset.json does not say how the labels were converted: it is not of mstkd convert")
    classes = _values(record.get("classes", {}), "classes")
    enhancing, small = classes.get(ET), record.get("small_et_becomes")
    if release is not None:
        target = RELEASES[release]
        lacking = [name for name in classes if name not in target.classes]
        if lacking or not classes:
            what = (
                f"has no {', '.join(lacking)}" if lacking else "cannot be matched: the data set's classes have no names"
            )
            raise InputError(f"{release} {what}; its classes are {', '.join(target.classes)}")
        values = {0: 0} | {value: target.classes[name] for name, value in classes.items()}
        return Restoration(values, target.label_file, enhancing, small)
    if "release_values" not in record:
        raise InputError("several values of the release became one in this data set, so there is no way back")
    values = {int(written): own for written, own in _values(record["release_values"], "release_values").items()}
    # the file may be a stranger's, and this is where the segmentations go
    label_file = check_file_name(record.get("label_file"), f"label_file in {RECORD_KEY} of dataset.json")
    if "{case}" not in label_file:
        raise InputError(f"label_file in {RECORD_KEY} of dataset.json is {label_file!r}, expected a name with {{case}}")
    return Restoration(values, label_file, enhancing, small)


def _values(table: Any, name: str) -> dict[str, int]:
    """A table of labels, checked: they are written as uint8."""
    wrong = not isinstance(table, Mapping) or any(
        isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= HIGHEST_LABEL
        for value in table.values()
    )
    if wrong or (name == "release_values" and any(not re.fullmatch(r"\d{1,3}", str(key)) for key in table)):
        raise InputError(
            f"{name} in {RECORD_KEY} of dataset.json is {table!r}, expected labels from 0 to {HIGHEST_LABEL}"
        )
    return dict(table)


def restore_file(
    prediction: Path, target: Path, how: Restoration, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> None:
    """Write one prediction with the release's values, and read it back to see that nothing was lost.

    Parameters
    ----------
    prediction
        Segmentation with the data set's values.
    target
        File to write, in one step.
    how
        From :func:`restoration`.
    change
        Applied to the prediction first, integers in SimpleITK's order (z, y, x): a post-processing.

    Raises
    ------
    ValueError
        If the file cannot be read, has a value that is none of the data set's, or is not the same when turned into the
        data set's values again. The message begins with a verb.
    """
    check_complete(prediction)
    image = read_image(prediction)
    stored = sitk.GetArrayFromImage(image)
    found = np.unique(stored)
    wrong = [f"{value:g}" for value in found.tolist() if value not in how.values]
    if wrong:
        raise InputError(f"holds {', '.join(wrong)}, expected the data set's values {sorted(how.values)}")
    segmentation = stored.astype(np.uint8)
    if change is not None:
        segmentation = change(segmentation)
    restored = sitk.GetImageFromArray(_mapped(segmentation, how.values))
    restored.CopyInformation(image)
    unfinished = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        sitk.WriteImage(restored, str(unfinished), useCompression=True, imageIO="NiftiImageIO")
        back = {own: written for written, own in how.values.items()}
        again = read_image(unfinished)
        values = sitk.GetArrayFromImage(again)
        if not (
            set(np.unique(values).tolist()) <= set(back)
            and np.array_equal(_mapped(values, back), segmentation)
            and not _grid(image).differences(_grid(again))
        ):
            raise InputError("is not the same when turned into the data set's values again")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _mapped(values: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for value, other in mapping.items():
        table[value] = other
    return table[values]


def _grid(image: sitk.Image) -> Geometry:
    return geometry_of(image)
