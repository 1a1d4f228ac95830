"""What each preprocessed case has: which modalities, and whether it has a label. Read from the data once, then kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.case_cache import kept_by_case
from nnunetv2_mstkd.nnunet.plans import CONVERSION

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
    file, ignore = folder.with_name(f"{folder.name}_cases.json"), dataset_json.get("labels", {}).get("ignore")

    def read(unread: list[str]) -> Iterable[CaseFacts]:
        if len(unread) > 100:
            log(f"reading {len(unread)} preprocessed cases once, to see which modalities they have ({file})")
        dataset = infer_dataset_class(str(folder))(str(folder), unread)
        with ThreadPoolExecutor(THREADS) as pool:  # threads: reading releases the interpreter's lock
            return list(pool.map(lambda case: _read(dataset, case, ignore), unread))

    def decode(entry: Mapping[str, Any]) -> CaseFacts:
        return CaseFacts(tuple(map(bool, entry["present"])), bool(entry["labelled"]))

    facts = kept_by_case(file, folder, cases, read=read, encode=asdict, decode=decode, log=log)
    _check(facts, dataset_json, names, folder.parent)
    return facts


def _read(dataset: Any, case: str, ignore: int | None) -> CaseFacts:
    data, segmentation, _, _ = dataset.load_case(case)
    middle = data.shape[1] // 2  # one slice tells of most channels that they are there
    present = tuple(bool(np.any(data[channel, middle]) or np.any(data[channel])) for channel in range(data.shape[0]))
    labelled = ignore is None or not bool(np.isin(segmentation[:], (ignore, -1)).all())
    return CaseFacts(present, labelled)


def _check(facts: Mapping[str, CaseFacts], dataset_json: Mapping[str, Any], names: Sequence[str], folder: Path) -> None:
    record = dataset_json.get(CONVERSION)
    record = record if isinstance(record, Mapping) else {}
    missing, unlabelled = record.get("missing"), record.get("unlabelled") or ()
    channels = dataset_json.get("channel_names", dataset_json.get("modality"))  # as the conversion writes them
    for case, entry in facts.items():
        if not any(entry.present):
            raise InputError(
                f"case {case} has no modality: all {len(entry.present)} channels of its preprocessed data are zero; "
                f"remove it from the data set"
            )
        if not isinstance(missing, Mapping):  # not converted by this package, or by an earlier version
            continue
        said = [name for number, name in enumerate(names) if channels[str(number)] in missing.get(case, ())]
        found = [name for name, there in zip(names, entry.present, strict=True) if not there]
        if said != found or (case in unlabelled) == entry.labelled:
            raise InputError(
                f"dataset.json says of case {case} that it lacks {', '.join(said) or 'nothing'} and is "
                f"{'un' * (case in unlabelled)}labelled, but its preprocessed data lack {', '.join(found) or 'nothing'}"
                f" and are {'un' * (not entry.labelled)}labelled; convert the data set again, or, if it has been, run "
                f"nnUNetv2_plan_and_preprocess: nnUNetv2_preprocess alone leaves {folder / 'dataset.json'} as it was"
            )
