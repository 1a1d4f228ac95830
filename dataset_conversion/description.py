"""The description of a data set that a converter needs: its declaration, its checks, and reading it from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, cast

import yaml

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.nnunet.patients import patient_from_name
from nnunetv2_mstkd.nnunet.plans import CONVERSION

from .modality_names import canonical_modality

FILE_ENDING = ".nii.gz"

LABEL = "label"
BACKGROUND = "background"
IGNORE = "ignore"
HIGHEST_LABEL = 255
"""Labels are written as uint8."""

FILE_KEYS = (
    "modalities", "label", "labels", "regions_class_order", "cases", "test_cases", "remap", "patient",
)  # fmt: skip
"""Keys of a description file; the other attributes belong to releases."""


@dataclass(frozen=True)
class Grid:
    """The grid of a release's images: voxels and mm per axis and, if known, origin (mm) and direction cosines.

    Axes and signs follow ITK's convention, LPS.
    """

    name: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()


@dataclass(frozen=True)
class Slices:
    """How a release stores a case as 2-D slices, in files that hold all channels."""

    spacing: tuple[float, ...]
    """mm along x, y and z, which the files do not say."""
    substitute: str
    """The channel whose copy takes the place of an absent one."""

    def __post_init__(self) -> None:
        if len(self.spacing) != 3 or not all(0 < mm < math.inf for mm in self.spacing):
            given = " ".join(f"{mm:g}" for mm in self.spacing)
            raise InputError(f"--spacing is {given}, expected three lengths in mm, more than 0")


@dataclass(frozen=True)
class Description:
    """A data set with one folder per case and one file per modality, one stacked file per case, or a folder of slices.

    Attributes
    ----------
    modalities
        Maps each channel to the pattern of its file within the case folder (``T1.nii.gz``, ``*_t1.nii.gz``), or to
        several of which one must match; ``{case}`` is the name of the case. The order is that of nnU-Net's channels.
        nnU-Net normalises by channel name: ``CT`` selects its CT normalisation, ``noNorm`` none, any other name the
        z-score.
    label
        Pattern of the label file within the case folder, or several.
    labels
        As in nnU-Net's ``dataset.json``: maps each label to its value, or each region to several. ``background`` is 0,
        the others are consecutive from 1, ``ignore`` (optional) is the highest.
    regions_class_order
        With regions: the value that each region writes into a segmentation, in the order of the regions.
    cases
        Pattern of the case folders within the data set. A case is named after the last part of its folder.
    test_cases
        Names, or patterns of names, of the cases that nnU-Net shall not train on. Their label files are optional.
    remap
        Maps values in the label files to values to write, for labels that are not consecutive (``{4: 3}``). A value
        that only results from remapping must not occur in the files.
    patient
        Regular expression whose first group in the name of a case is the patient. Cases of one patient are never on
        both sides of a split. Empty: each case is a separate patient.
    case_names
        Regular expression for the names of all case folders, which are then searched at any depth. Releases only.
    stack
        Order of the channels if each case is one file of four dimensions in ``imagesTr``, or a folder of slices.
        Releases only.
    slices
        Set if each case is a folder of 2-D slices; ``{slice}`` in a pattern is the number of the slice. Releases only.
    ignore_added
        Whether ``ignore`` was added for unlabelled cases: then no label file may hold its value.
    release, classes, label_file, grid, small_et_becomes
        See :class:`.releases.Release`; ``classes`` holds the written values.

    Raises
    ------
    ValueError
        If nnU-Net could not train on such a data set.
    """

    modalities: Mapping[str, str | Sequence[str]]
    label: str | Sequence[str]
    labels: Mapping[str, int | Sequence[int]]
    regions_class_order: Sequence[int] = ()
    cases: str = "*"
    test_cases: Sequence[str] = ()
    remap: Mapping[int, int] = field(default_factory=dict)
    patient: str = ""
    case_names: str = ""
    stack: Sequence[str] = ()
    slices: Slices | None = None
    ignore_added: bool = False
    release: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    label_file: str = "{case}.nii.gz"
    grid: Grid | None = None
    small_et_becomes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.modalities, Mapping) or not self.modalities:
            raise InputError(f"modalities is {self.modalities!r}, expected name: pattern for each channel, in order")
        strange = [name for name in self.modalities if not isinstance(name, str) or name == LABEL]
        if strange:
            raise InputError(f"a modality is called {strange[0]!r}, expected a string other than '{LABEL}'")
        for name, patterns in {**self.modalities, LABEL: self.label}.items():
            for pattern in alternatives(patterns) or [None]:
                _check_pattern(name, pattern)
        _check_pattern("cases", self.cases)
        by_sequence: dict[str, list[str]] = {}
        for name in self.modalities:
            by_sequence.setdefault(canonical_modality(name), []).append(name)
        for sequence, names in by_sequence.items():
            if len(names) > 1:
                raise InputError(f"the modalities {' and '.join(names)} are both {sequence}, expected one")
        if not _is_list(self.test_cases) or not all(isinstance(name, str) for name in self.test_cases):
            raise InputError(f"test_cases is {self.test_cases!r}, expected a list of names")
        if not isinstance(self.remap, Mapping) or not all(map(_is_integer, [*self.remap, *self.remap.values()])):
            raise InputError(f"remap is {self.remap!r}, expected integer: integer")
        self._check_labels()
        self._check_regions()
        self._check_patient()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Description:
        """Make a description from the content of a JSON or YAML file, whose keys are the attributes' names.

        Names of known MRI sequences become those of :mod:`.modality_names`.
        """
        unknown = [key for key in mapping if key not in FILE_KEYS]
        if unknown:
            raise InputError(f"unknown key {unknown[0]!r} in the description, known are: {', '.join(FILE_KEYS)}")
        missing = [key for key in ("modalities", LABEL, "labels") if key not in mapping]
        if missing:
            raise InputError(f"the description lacks {', '.join(missing)}")
        values = dict(mapping)
        if isinstance(values.get("remap"), Mapping):
            # JSON has no integers as keys
            values["remap"] = {
                int(key) if str(key).lstrip("-").isdigit() else key: value for key, value in values["remap"].items()
            }
        given = cls(**values)
        classes = {} if given.regions_class_order else dict(given.regions)
        names = {canonical_modality(name): patterns for name, patterns in given.modalities.items()}
        return replace(given, modalities=names, classes=classes)

    @property
    def regions(self) -> dict[str, int | Sequence[int]]:
        """The labels to segment: all but background and ignore."""
        return {name: value for name, value in self.labels.items() if name not in (BACKGROUND, IGNORE)}

    @property
    def declared_values(self) -> frozenset[int]:
        """Every value that a written label file may hold."""
        return frozenset(value for entry in self.labels.values() for value in _values(entry))

    @property
    def value_map(self) -> dict[int, int]:
        """Maps every value that a label file of the release may hold to the value to write."""
        targets = {*self.remap.values(), *([self.labels[IGNORE]] if self.ignore_added else [])}
        same = {value: value for value in self.declared_values if value not in targets and value not in self.remap}
        return dict(sorted({**same, **self.remap}.items()))

    def with_ignore(self) -> Description:
        """Return the description with a label ``ignore`` above the others, or itself if it declares one."""
        if IGNORE in self.labels:
            return self
        labels = {**self.labels, IGNORE: max(self.declared_values) + 1}
        return replace(self, labels=labels, ignore_added=True)

    def patient_of(self, case: str) -> str:
        """The patient that a case belongs to."""
        return patient_from_name(self.patient, "patient")(case) if self.patient else case

    def is_test_case(self, case: str) -> bool:
        """Whether `case` is one of ``test_cases``."""
        return any(fnmatchcase(case, pattern) for pattern in self.test_cases)

    def dataset_json(
        self, num_training: int, missing: Mapping[str, Sequence[str]], unlabelled: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return what nnU-Net's ``dataset.json`` holds.

        Parameters
        ----------
        num_training
            Number of training cases.
        missing
            The modalities that are zero images, for each training case that lacks some.
        unlabelled
            Training cases whose label is ``ignore`` in every voxel.
        """
        content: dict[str, Any] = {
            "channel_names": {str(index): name for index, name in enumerate(self.modalities)},
            "labels": {name: value if isinstance(value, int) else list(value) for name, value in self.labels.items()},
        }
        if self.regions_class_order:
            content["regions_class_order"] = list(self.regions_class_order)
        record = {**self._record(), "missing": {case: list(names) for case, names in missing.items()}}
        if unlabelled:
            record["unlabelled"] = list(unlabelled)
        return {**content, "numTraining": num_training, "file_ending": FILE_ENDING, CONVERSION: record}

    def _record(self) -> dict[str, Any]:
        """What `mstkd restore-labels` needs to restore a release's segmentations, and how cases name their patients."""
        record: dict[str, Any] = {
            "release": self.release or "generic",
            "release_values": {str(written): own for own, written in self.value_map.items()},
            "classes": dict(self.classes),
            "label_file": self.label_file,
        }
        if self.small_et_becomes is not None:
            record["small_et_becomes"] = self.small_et_becomes
        if self.patient:
            record["patient"] = self.patient
        if len(set(self.value_map.values())) < len(self.value_map):
            del record["release_values"]  # two values became one, which cannot be undone
        return record

    def _check_labels(self) -> None:
        if not isinstance(self.labels, Mapping) or self.labels.get(BACKGROUND) != 0:
            raise InputError(f"labels is {self.labels!r}, expected name: value with '{BACKGROUND}': 0")
        for name, entry in self.labels.items():
            values = _values(entry)
            if not values or not all(map(_is_integer, values)):
                raise InputError(f"label {name!r} is {entry!r}, expected an integer or a list of integers")
        if IGNORE in self.labels and not _is_integer(self.labels[IGNORE]):
            raise InputError(f"label '{IGNORE}' is {self.labels[IGNORE]!r}, expected one integer")
        strange = sorted(set(self.remap.values()) - self.declared_values)
        if strange:
            raise InputError(f"remap writes {strange}, which labels does not declare")
        found = sorted(self.declared_values)
        if found != list(range(len(found))) or len(found) < 2 or found[-1] > HIGHEST_LABEL:
            raise InputError(
                f"the label values are {found}, expected consecutive ones from 0 to at least 1 and at most "
                f"{HIGHEST_LABEL}, as nnU-Net needs them; 'remap' turns the files' own values into these"
            )
        if self.labels.get(IGNORE, found[-1]) != found[-1]:
            raise InputError(f"label '{IGNORE}' is {self.labels[IGNORE]}, expected the highest value, {found[-1]}")
        shared = [name for name, entry in self.regions.items() if self.labels.get(IGNORE) in _values(entry)]
        if shared:
            raise InputError(
                f"label '{IGNORE}' is {found[-1]}, which is a value of {shared[0]} too, expected {found[-1] + 1}"
            )

    def _check_regions(self) -> None:
        if not _is_list(self.regions_class_order) or not all(map(_is_integer, self.regions_class_order)):
            raise InputError(f"regions_class_order is {self.regions_class_order!r}, expected a list of integers")
        order = list(self.regions_class_order)
        if not any(len(_values(entry)) > 1 for entry in self.labels.values()):
            if order:
                raise InputError(f"regions_class_order is {order}, but no label is a list of several values")
            return
        if len(order) != len(self.regions) or not set(order) <= self.declared_values - {0}:
            raise InputError(
                f"regions_class_order is {order}, expected one label value for each of the {len(self.regions)} regions "
                f"{', '.join(self.regions)}: the value that the region writes, later ones over earlier ones"
            )

    def _check_patient(self) -> None:
        if self.patient != "":
            patient_from_name(self.patient, "patient")


def read_description(path: Path) -> dict[str, Any]:
    """Read a description from a ``.json``, ``.yaml`` or ``.yml`` file; nothing but its form is checked."""
    if not path.is_file():
        raise MissingFileError(f"no description {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(text)
        else:
            raise InputError(f"it ends in {path.suffix!r}, expected .json, .yaml or .yml")
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the description {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"the description {path} holds a {type(content).__name__}, expected keys and values")
    return content


def alternatives(patterns: str | Sequence[str]) -> list[str]:
    """One pattern, or several, as a list."""
    return [patterns] if isinstance(patterns, str) or not isinstance(patterns, Sequence) else list(patterns)


def _values(entry: int | Sequence[int]) -> list[int]:
    """Return the values of one entry of ``labels``."""
    return list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [cast(int, entry)]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_pattern(name: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern.strip() or PurePath(pattern).is_absolute():
        raise InputError(f"the pattern of {name} is {pattern!r}, expected a relative one such as '*_{name}.nii.gz'")
