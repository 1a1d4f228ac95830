"""What a converter has to know of a data set, as one declaration; reading it from a file and checking it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, cast

import yaml

BACKGROUND = "background"
IGNORE = "ignore"
HIGHEST_LABEL = 255
"""Labels are written as uint8."""


@dataclass(frozen=True)
class Description:
    """A data set with one folder per case and one file per modality.

    Attributes
    ----------
    modalities
        Channel name -> pattern of its file within the case folder (``T1.nii.gz``, ``*_t1.nii.gz``). The order is the
        order of nnU-Net's channels. nnU-Net normalises by channel name: ``CT`` means CT's normalisation, ``noNorm``
        none, a name that it does not know the z-score.
    label
        Pattern of the label file within the case folder.
    labels
        As in nnU-Net's ``dataset.json``: name -> value, or name -> several values for a region. ``background`` is 0,
        the others are consecutive from 1, ``ignore`` (if there is one) is the highest.
    regions_class_order
        With regions: the value that each region writes into a segmentation, in the order of the regions.
    cases
        Pattern of the case folders within the data set. A case is named after the last part of its folder.
    test_cases
        Names, or patterns of names, of the cases that nnU-Net shall not train on. Their label files are optional.
    remap
        Value in the label files -> value to write, for releases whose labels are not consecutive (``{4: 3}``).

    Raises
    ------
    ValueError
        If nnU-Net could not train on such a data set.
    """

    modalities: Mapping[str, str]
    label: str
    labels: Mapping[str, int | Sequence[int]]
    regions_class_order: Sequence[int] = ()
    cases: str = "*"
    test_cases: Sequence[str] = ()
    remap: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.modalities, Mapping) or not self.modalities:
            raise ValueError(f"modalities is {self.modalities!r}, expected name: pattern for each channel, in order")
        for name, pattern in {**self.modalities, "label": self.label, "cases": self.cases}.items():
            _check_pattern(name, pattern)
        if isinstance(self.test_cases, str) or not all(isinstance(name, str) for name in self.test_cases):
            raise ValueError(f"test_cases is {self.test_cases!r}, expected a list of names")
        if not isinstance(self.remap, Mapping) or not all(map(_is_integer, [*self.remap, *self.remap.values()])):
            raise ValueError(f"remap is {self.remap!r}, expected integer: integer")
        self._check_labels()
        self._check_regions()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Description:
        """Make a description of what a JSON or YAML file holds; keys are the attributes' names.

        Raises
        ------
        ValueError
            For an unknown key, a missing one, or whatever the class itself refuses.
        """
        known = [item.name for item in fields(cls)]
        unknown = [key for key in mapping if key not in known]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} in the description, known are: {', '.join(known)}")
        missing = [key for key in ("modalities", "label", "labels") if key not in mapping]
        if missing:
            raise ValueError(f"the description lacks {', '.join(missing)}")
        values = dict(mapping)
        if isinstance(values.get("remap"), Mapping):
            # JSON has no integers as keys
            values["remap"] = {
                int(key) if str(key).lstrip("-").isdigit() else key: value for key, value in values["remap"].items()
            }
        return cls(**values)

    @property
    def regions(self) -> dict[str, int | Sequence[int]]:
        """The labels to segment: all but background and ignore."""
        return {name: value for name, value in self.labels.items() if name not in (BACKGROUND, IGNORE)}

    @property
    def declared_values(self) -> frozenset[int]:
        """Every value that a written label file may hold."""
        return frozenset(value for entry in self.labels.values() for value in _values(entry))

    def is_test_case(self, case: str) -> bool:
        """Whether `case` is one of ``test_cases``."""
        return any(fnmatchcase(case, pattern) for pattern in self.test_cases)

    def dataset_json(self, num_training: int) -> dict[str, Any]:
        """Return what nnU-Net's ``dataset.json`` holds for `num_training` training cases."""
        content: dict[str, Any] = {
            "channel_names": {str(index): name for index, name in enumerate(self.modalities)},
            "labels": {name: value if isinstance(value, int) else list(value) for name, value in self.labels.items()},
        }
        if self.regions_class_order:
            content["regions_class_order"] = list(self.regions_class_order)
        return {**content, "numTraining": num_training, "file_ending": ".nii.gz"}

    def _check_labels(self) -> None:
        if not isinstance(self.labels, Mapping) or self.labels.get(BACKGROUND) != 0:
            raise ValueError(f"labels is {self.labels!r}, expected name: value with '{BACKGROUND}': 0")
        for name, entry in self.labels.items():
            values = _values(entry)
            if not values or not all(map(_is_integer, values)):
                raise ValueError(f"label {name!r} is {entry!r}, expected an integer or a list of integers")
        if IGNORE in self.labels and not _is_integer(self.labels[IGNORE]):
            raise ValueError(f"label '{IGNORE}' is {self.labels[IGNORE]!r}, expected one integer")
        found = sorted(self.declared_values)
        if found != list(range(len(found))) or len(found) < 2 or found[-1] > HIGHEST_LABEL:
            raise ValueError(
                f"the label values are {found}, expected consecutive ones from 0 to at least 1 and at most "
                f"{HIGHEST_LABEL}, as nnU-Net needs them; 'remap' turns the files' own values into these"
            )
        if self.labels.get(IGNORE, found[-1]) != found[-1]:
            raise ValueError(f"label '{IGNORE}' is {self.labels[IGNORE]}, expected the highest value, {found[-1]}")

    def _check_regions(self) -> None:
        order = list(self.regions_class_order)
        if not any(len(_values(entry)) > 1 for entry in self.labels.values()):
            if order:
                raise ValueError(f"regions_class_order is {order}, but no label is a list of several values")
            return
        if len(order) != len(self.regions) or not set(order) <= self.declared_values - {0}:
            raise ValueError(
                f"regions_class_order is {order}, expected one label value for each of the {len(self.regions)} regions "
                f"{', '.join(self.regions)}: the value that the region writes, later ones over earlier ones"
            )


def read_description(path: Path) -> dict[str, Any]:
    """Read a description from a ``.json``, ``.yaml`` or ``.yml`` file, unchecked.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is of another type, not well-formed, or no mapping.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(text)
        else:
            raise ValueError(f"it ends in {path.suffix!r}, expected .json, .yaml or .yml")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the description {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the description {path} holds a {type(content).__name__}, expected keys and values")
    return content


def _values(entry: int | Sequence[int]) -> list[int]:
    """Return the values of one entry of ``labels``."""
    return list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [cast(int, entry)]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_pattern(name: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern.strip() or PurePath(pattern).is_absolute():
        raise ValueError(f"the pattern of {name} is {pattern!r}, expected a relative one such as '*_{name}.nii.gz'")
