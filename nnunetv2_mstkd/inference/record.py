"""``predictions.json``: which modalities each case was predicted from, and with which model."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import write_json
from nnunetv2_mstkd.inference.expected_dice import ENTROPY, Range, format_dice
from nnunetv2_mstkd.nnunet.input_folder import Case

SAVE_INTERVAL = 2.0
"""Seconds between two versions of the file, which thousands of cases would otherwise write thousands of times."""


class Record:
    """What was predicted from what.

    Parameters
    ----------
    run
        Everything that all predictions of the folder have in common: model, folds, dropped modalities ...
    names
        Names of the C channels.
    expected
        See :func:`~nnunetv2_mstkd.inference.expected_dice.read_expected_dice`.
    ranges
        See :func:`~nnunetv2_mstkd.inference.expected_dice.read_ranges`.
    resume
        Keep the cases of an earlier run; InputError if it had another model or other options.
    """

    def __init__(
        self,
        file: Path,
        run: Mapping[str, Any],
        names: Sequence[str],
        expected: Mapping[int, Mapping[str, float]],
        ranges: Mapping[int, Mapping[str, Range]] | None = None,
        *,
        resume: bool,
    ) -> None:
        self.file, self.names, self.expected, self.ranges = file, names, expected, ranges or {}
        self.run = json.loads(json.dumps(run))
        # with another number of parts than before, cases are in other files
        paths = sorted(file.parent.glob("predictions*.json")) if resume else []
        records = {path: self._read(path) for path in paths}
        self.resumed = bool(records)
        self.cases, self.kept = records.pop(file, ({}, {}))
        self._elsewhere = {name: entry for cases, kept in records.values() for name, entry in {**kept, **cases}.items()}
        self._saved = -float("inf")

    def _read(self, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The predicted and the kept cases of a record of the run that is continued."""
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            cases = {str(name): _checked(entry) for name, entry in before["cases"].items()}
            kept = {str(name): {"images": dict(entry["images"])} for name, entry in before.get("kept", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is not a record of predictions; leave out --continue_prediction") from error
        different = self._of_other_run(before)
        if different:
            key, value = next(iter(different.items()))
            raise InputError(
                f"the predictions in {file.parent} are of another run: {key} was {value!r} and is now "
                f"{self.run[key]!r}; continue with the same options, or leave out --continue_prediction"
            )
        return cases, kept

    def _of_other_run(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """What a record says otherwise than this run; what those of earlier versions do not say is taken as equal."""
        unknown = {key: self.run.get(key) for key in ("weights", "temperatures")}
        before = {**unknown, "calibrated": False, "largest_component": False, **before}
        return {key: before.get(key) for key, value in self.run.items() if before.get(key) != value}

    def remove_stale(self) -> None:
        """Remove records of earlier runs, whose cases are predicted anew: of another run or number of parts.

        Those of the other parts of this run, which write at the same time, stay.
        """
        for file in self.file.parent.glob("predictions*.json"):
            try:
                same = not self._of_other_run(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                same = False
            if not same or _parts(file) != _parts(self.file):
                file.unlink(missing_ok=True)

    def keep(self, case: Case) -> None:
        """Note that a case keeps the segmentation that it has from a run without a record."""
        self.kept[case.name] = {"images": self._images(case)}

    def has(self, case: Case) -> bool:
        """Whether the case was predicted, or kept, with the images that it has now; some may be newer."""
        entry = self.cases.get(case.name) or self.kept.get(case.name) or self._elsewhere.get(case.name)
        return entry is not None and entry.get("images") == self._images(case)

    def _images(self, case: Case) -> dict[str, str | None]:
        """Stamps by modality, without those of dropped ones."""
        return {
            name: stamp
            for channel, (name, stamp) in enumerate(zip(self.names, case.stamps, strict=True))
            if case.availability[channel] or channel in case.all_zero
        }

    def add(self, case: Case, entropy: float | None = None, presence: Mapping[str, float] | None = None) -> None:
        """Note that the segmentation of a case is written.

        ``entropy`` is the mean over its foreground, ``presence`` the probability of presence of labels or regions.
        """
        names = list(zip(self.names, case.availability, strict=True))
        entry: dict[str, Any] = {
            "subset": modalities.subset_name(case.availability, self.names),
            "modalities": [name for name, available in names if available],
            "absent": [name for name, available in names if not available],
            "images": self._images(case),
        }
        if case.all_zero:
            entry["all_zero"] = [self.names[channel] for channel in case.all_zero]
        if self.expected:
            entry["expected_dice"] = self.expected.get(modalities.subset_code(case.availability))
        if presence is not None:
            entry["presence"] = {name: round(score, 4) for name, score in presence.items()}
        if entropy is not None:
            entry[ENTROPY] = round(entropy, 4)
        flags = self._flags(modalities.subset_code(case.availability), entropy)
        if flags:
            entry["flags"] = flags
        self.cases[case.name] = entry
        self.kept.pop(case.name, None)
        if time.monotonic() - self._saved >= SAVE_INTERVAL:
            self.save()

    def _flags(self, code: int, entropy: float | None) -> list[str]:
        """What is out of the range of the evaluation's cases."""
        flags = []
        low, high = self.ranges.get(code, {}).get(ENTROPY, (-math.inf, math.inf))
        if entropy is not None and not low <= entropy <= high:
            flags.append(f"entropy {entropy:.3f}, in the evaluation {low:.3f} to {high:.3f}")
        full = self.ranges.get(2 ** len(self.names) - 1, {})
        for region, dice in (self.expected.get(code) or {}).items():
            lowest = full.get(region, (-math.inf, math.inf))[0]
            if dice < lowest:
                flags.append(
                    f"{region}: expected Dice {dice:.3f}, below every case of the evaluation with all modalities "
                    f"({lowest:.3f})"
                )
        return flags

    def flagged(self) -> list[str]:
        """One line per case that is out of the range of the evaluation's cases."""
        return [f"{name}: {'; '.join(entry['flags'])}" for name, entry in self.cases.items() if entry.get("flags")]

    def save(self) -> None:
        """Write the file."""
        kept = {"kept": dict(sorted(self.kept.items()))} if self.kept else {}
        write_json(self.file, {**self.run, "cases": dict(sorted(self.cases.items())), **kept})
        self._saved = time.monotonic()

    def by_subset(self) -> list[str]:
        """Return one line per subset: how many cases have it, and the Dice to expect."""
        counts = Counter(entry["subset"] for entry in self.cases.values())
        first = {entry["subset"]: entry.get("expected_dice") for entry in reversed(self.cases.values())}
        return [f"{subset}: {count}{format_dice(first[subset])}" for subset, count in counts.most_common()]


def _parts(file: Path) -> str:
    """The number of parts in the name of a record, as text; empty for a single one."""
    return file.stem.rpartition("of")[2] if "_part" in file.stem else ""


def _checked(entry: Any) -> dict[str, Any]:
    """Return a case's entry if it can be read."""
    dice = entry.get("expected_dice") or {}
    texts = [entry["subset"], *entry["modalities"], *entry.get("all_zero", [])]
    numbers = all(isinstance(value, (int, float)) for value in dice.values())
    if not numbers or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return entry
