"""What each preprocessed case has: which modalities, and whether it has a label. Read from the data once, then kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_mstkd.errors import InputError, MissingFileError, WriteError
from nnunetv2_mstkd.images.atomic import read_json, write_json
from nnunetv2_mstkd.nnunet.plans import CONVERSION

FORMAT = 1
THREADS = 4


@dataclass(frozen=True)
class CaseFacts:
    """What a case has."""

    present: tuple[bool, ...]
    """For each of the C channels, whether it has an image: one that is zero everywhere counts as absent."""
    labelled: bool
    """Whether its label says anything: False if every voxel has the ignore label."""

    @property
    def complete(self) -> bool:
        """Whether it has all modalities."""
        return all(self.present)


def read_case_facts(
    folder: Path,
    cases: Sequence[str],
    dataset_json: Mapping[str, Any],
    names: Sequence[str],
    log: Callable[[str], None] = print,
) -> dict[str, CaseFacts]:
    """Read what each case of a folder of preprocessed data has.

    The facts are kept in ``FOLDER_cases.json`` beside the folder. A case is read again when its file has changed.

    Parameters
    ----------
    folder
        Preprocessed data of one configuration.
    cases
        Names of the cases.
    dataset_json
        Content of dataset.json: its ignore label and, from ``mstkd convert``, which cases lack what.
    names
        Names of the C channels.
    log
        Gets a line if many cases have to be read or the facts cannot be kept.

    Raises
    ------
    MissingFileError
        For a case without preprocessed data.
    InputError
        For a case without any modality, and where ``dataset.json`` contradicts the data.
    """
    file = folder.with_name(f"{folder.name}_cases.json")
    known = _read_kept(file)
    stamps = {case: stamp(folder, case) for case in cases}
    facts = {case: known[case][1] for case in cases if case in known and known[case][0] == stamps[case]}
    unread = [case for case in cases if case not in facts]
    if unread:
        if len(unread) > 100:
            log(f"reading {len(unread)} preprocessed cases once, to see which modalities they have ({file})")
        ignore = dataset_json.get("labels", {}).get("ignore")
        dataset = infer_dataset_class(str(folder))(str(folder), list(unread))
        with ThreadPoolExecutor(THREADS) as pool:  # threads: reading releases the interpreter's lock
            facts |= zip(unread, pool.map(lambda case: _read(dataset, case, ignore), unread), strict=True)
        kept = {case: entry for case, entry in known.items() if case not in facts}
        kept |= {case: (stamps[case], facts[case]) for case in facts}
        content = {case: {"stamp": mark, **asdict(entry)} for case, (mark, entry) in sorted(kept.items())}
        try:
            write_json(file, {"format": FORMAT, "cases": content}, indent=1)
        except WriteError as error:
            log(f"the modalities of the cases are read again next time: {error}")
    _check(facts, dataset_json, names)
    return facts


def _read(dataset: Any, case: str, ignore: int | None) -> CaseFacts:
    data, segmentation, _, _ = dataset.load_case(case)
    middle = data.shape[1] // 2  # one slice tells of most channels that they are there
    present = tuple(bool(np.any(data[channel, middle]) or np.any(data[channel])) for channel in range(data.shape[0]))
    labelled = ignore is None or not bool(np.isin(segmentation[:], (ignore, -1)).all())
    return CaseFacts(present, labelled)


def stamp(folder: Path, case: str) -> list[int]:
    """What tells a preprocessed case from one that replaces it."""
    for ending in (".b2nd", ".npz"):
        path = folder / f"{case}{ending}"
        if path.is_file():
            return [path.stat().st_size, path.stat().st_mtime_ns]
    raise MissingFileError(f"no preprocessed data of case {case} in {folder}; preprocess the data set again")


def _read_kept(file: Path) -> dict[str, tuple[list[int], CaseFacts]]:
    """Kept facts with their stamps; none if the file is of another format or damaged: it is only a cache."""
    try:
        content = read_json(file)
        return {
            case: (entry["stamp"], CaseFacts(tuple(map(bool, entry["present"])), bool(entry["labelled"])))
            for case, entry in (content["cases"] if content["format"] == FORMAT else {}).items()
        }
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return {}


def _check(facts: Mapping[str, CaseFacts], dataset_json: Mapping[str, Any], names: Sequence[str]) -> None:
    record = dataset_json.get(CONVERSION)
    record = record if isinstance(record, Mapping) else {}
    missing, unlabelled = record.get("missing"), record.get("unlabelled") or ()
    for case, entry in facts.items():
        if not any(entry.present):
            raise InputError(
                f"case {case} has no modality: all {len(entry.present)} channels of its preprocessed data are zero; "
                f"remove it from the data set"
            )
        if not isinstance(missing, Mapping):  # not converted by this package, or by an earlier version
            continue
        said = [name for name in names if name in missing.get(case, ())]
        found = [name for name, there in zip(names, entry.present, strict=True) if not there]
        if said != found or (case in unlabelled) == entry.labelled:
            raise InputError(
                f"dataset.json says of case {case} that it lacks {', '.join(said) or 'nothing'} and is "
                f"{'un' * (case in unlabelled)}labelled, but its preprocessed data lack {', '.join(found) or 'nothing'}"
                f" and are {'un' * (not entry.labelled)}labelled; convert and preprocess the data set again"
            )
