"""Which cases train, validate and test. Cases of one patient always stay together."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import write_json
from nnunetv2_mstkd.nnunet.splits import read_splits

MAX_FOLDS = 5
SEED = 12345
"""nnU-Net's own seed, so that five folds of a data set are the same with and without this module."""

Splits = list[dict[str, list[str]]]
"""Content of ``splits_final.json``: for each fold the cases to train on and those to validate on."""

CASE_COLUMNS = ("case", "name", "id", "subject_id", "case_id", "subject", "brats_id", "data_name")
PART_COLUMNS = ("part", "split", "set", "subset")

LIST_NAME = re.compile(r"(?:^|[_-])(train|val|test)[a-z]*[-_]?(?:(\d+)(?![a-z\d]))?")
"""Names of lists: the part, and perhaps the number of the fold, which ``val15splits`` does not give."""

GRADE = re.compile(r"^[HL]G_")
"""What the published lists of BraTS 2020 write before the name of a case: high or low grade."""


def cross_validation(
    cases: Sequence[str],
    folds: int | None = None,
    seed: int = SEED,
    *,
    patient_of: Callable[[str], str] = str,
) -> Splits:
    """Divide the patients into folds of equal size, each of which validates once.

    Parameters
    ----------
    cases
        Names of the training cases.
    folds
        Number of folds, at least 2; default 5, or one per patient if there are fewer.
    seed
        Seed of the random order of the patients.
    patient_of
        Maps a case to its patient. By default each case is one: then the folds are those of nnU-Net.
    """
    by_patient = _by_patient(cases, patient_of)
    patients = sorted(by_patient)
    folds = min(MAX_FOLDS, len(patients)) if folds is None else folds
    if not 2 <= folds <= len(patients):
        things = "training cases" if len(patients) == len(cases) else f"patients ({len(cases)} training cases)"
        one = "case" if len(patients) == len(cases) else "patient"
        raise InputError(f"{folds} folds of {len(patients)} {things}, expected at least 2 and at most one per {one}")
    # the draw of scikit-learn's KFold, which nnU-Net uses
    order = np.random.RandomState(seed).permutation(len(patients))
    splits = []
    for held_out in np.array_split(order, folds):
        validation = {case for number in held_out for case in by_patient[patients[number]]}
        splits.append({"train": sorted(set(cases) - validation), "val": sorted(validation)})
    return splits


def hold_out(cases: Sequence[str], validation: Sequence[str], *, patient_of: Callable[[str], str] = str) -> Splits:
    """Make one fold that validates on the named cases and trains on the others."""
    unknown = sorted(set(validation) - set(cases))
    if unknown:
        raise InputError(f"validation cases {', '.join(unknown)} are not training cases; these are {_some(cases)}")
    train = sorted(set(cases) - set(validation))
    if not train or not validation:
        raise InputError(f"{len(validation)} of {len(cases)} training cases validate, expected some, but not all")
    splits = [{"train": train, "val": sorted(set(validation))}]
    refuse_shared_patients(splits, patient_of)
    return splits


def with_unlabelled(
    splits: Splits, unlabelled: Sequence[str], tests: Sequence[str] = (), *, patient_of: Callable[[str], str] = str
) -> Splits:
    """Let each fold train on the unlabelled cases too, but for those of patients who validate or have a test case."""
    refuse_unlabelled([case for fold in splits for case in fold["val"]], unlabelled)
    made = []
    for number, fold in enumerate(splits):
        if set(fold["train"]) <= set(unlabelled):
            raise InputError(f"fold {number} trains on unlabelled cases only, expected a labelled one too")
        held_out = {patient_of(case) for case in (*fold["val"], *tests)}
        added = {case for case in unlabelled if patient_of(case) not in held_out}
        made.append({"train": sorted(added.union(fold["train"])), "val": fold["val"]})
    return made


def refuse_unlabelled(validation: Iterable[str], unlabelled: Sequence[str]) -> None:
    """Raise InputError if unlabelled cases validate."""
    wrong = sorted(set(validation) & set(unlabelled))
    if wrong:
        raise InputError(f"{_some(wrong)} cannot validate without a label; train on such cases, or leave them out")


def draw_test_cases(
    cases: Sequence[str], fraction: float, seed: int = SEED, *, patient_of: Callable[[str], str] = str
) -> list[str]:
    """Draw the cases of a share of the patients, at least one patient, at random."""
    if not 0 < fraction < 1:
        raise InputError(f"--test-fraction is {fraction:g}, expected more than 0 and less than 1")
    by_patient = _by_patient(cases, patient_of)
    number = max(1, round(fraction * len(by_patient)))
    if number >= len(by_patient):
        raise InputError(f"--test-fraction {fraction:g} leaves none of {len(by_patient)} patients to train on")
    order = np.random.default_rng(seed).permutation(sorted(by_patient))
    return sorted(case for patient in order[:number] for case in by_patient[str(patient)])


def refuse_shared_patients(splits: Splits, patient_of: Callable[[str], str]) -> None:
    """Raise ValueError if a fold trains and validates on one patient."""
    for number, fold in enumerate(splits):
        both = sorted({patient_of(case) for case in fold["train"]} & {patient_of(case) for case in fold["val"]})
        if both:
            raise InputError(
                f"fold {number} trains and validates on {len(both)} patients, such as {both[0]}; put all cases of a "
                "patient on one side"
            )


def read_lists(files: Sequence[Path], case_names: str = "") -> tuple[Splits, list[str]]:
    """Read published splits.

    Parameters
    ----------
    files
        Either one list of cases per part: a text file with one case per line, or a table ``.csv`` with a column for the
        case. Their names say ``train``, ``val`` or ``test``, perhaps after the name of the data set, and may end in the
        number of the fold (``train1.txt``, ``BraTS23_val.csv``); folders before the case names are ignored. Or one
        table ``.csv`` with a column for the case and one for the part (``train``, ``val``, ``test``). Or one ``.json``
        like nnU-Net's ``splits_final.json``. Lines that begin with ``#`` are comments.
    case_names
        Regular expression for the names of a release's cases: where ``HG_`` or ``LG_`` precedes such a name, it is
        removed.

    Returns
    -------
    The folds, and the test cases. A fold without a list of validation cases validates on the test cases.
    """
    parts: dict[int, dict[str, list[str]]] = defaultdict(dict)
    for file in files:
        if not file.is_file():
            raise MissingFileError(f"no file {file}")
        if file.suffix.lower() == ".json":
            parts.update(enumerate(read_splits(file)))
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text: {error}") from error
        number, found = _read_list([line for line in text.splitlines() if not line.startswith("#")], file)
        for part, names in found.items():
            if part in parts[number]:
                raise InputError(f"{file} is a second list of {part} cases for one fold")
            parts[number][part] = [_identifier(name, case_names) for name in names]
    where = ", ".join(map(str, files))
    found_folds = [_checked_fold(parts[number], where) for number in sorted(parts)]
    tests = [test for _, test in found_folds]
    if any(test != tests[0] for test in tests):
        raise InputError(
            f"the {len(tests)} splits have different test cases, of which a data set can have one set only; convert "
            "one data set per split"
        )
    return [fold for fold, _ in found_folds], tests[0]


def _checked_fold(parts: Mapping[str, list[str]], where: str) -> tuple[dict[str, list[str]], list[str]]:
    """Training and validation cases of a fold, and its test cases."""
    train, test = parts.get("train", []), parts.get("test", [])
    validation, test = (parts["val"], test) if "val" in parts else (test, [])
    if not train or not validation:
        raise InputError(f"{where}: no train or no val cases, expected lists of both")
    shared = (set(train) & set(validation)) | (set(test) & {*train, *validation})
    if shared:
        raise InputError(f"{where}: {_some(sorted(shared))} in more than one part")
    return {"train": sorted(set(train)), "val": sorted(set(validation))}, sorted(set(test))


def refuse_unknown_cases(splits: Splits, test: Sequence[str], cases: Iterable[str], protocol: str = "") -> None:
    """Raise InputError if lists, perhaps those of a protocol, name cases that do not exist."""
    named = listed_cases(splits, test)
    unknown = sorted(named - set(cases))
    if unknown:
        lists, advice = (f"the lists of {protocol}", "; complete the download") if protocol else ("the lists", "")
        raise InputError(
            f"{lists} name {len(unknown)} of {len(named)} cases that do not exist: {_some(unknown)}{advice}"
        )


def listed_cases(splits: Splits, test: Sequence[str]) -> set[str]:
    """All cases that lists name."""
    return {*test, *(case for fold in splits for part in fold.values() for case in part)}


def without(splits: Splits, skipped: Iterable[str]) -> Splits:
    """The folds without cases that were not converted; some of each part must be left."""
    gone = set(skipped)
    left = [{part: [case for case in fold[part] if case not in gone] for part in ("train", "val")} for fold in splits]
    for number, fold in enumerate(left):
        for part, cases in fold.items():
            if not cases:
                raise InputError(f"all {part} cases of fold {number} have problems: {_some(splits[number][part])}")
    return left


def write_splits(splits: Splits, path: Path) -> None:
    """Write ``splits_final.json`` atomically; its folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, splits, indent=4)


def present_splits(path: Path) -> Splits | None:
    """The content of ``splits_final.json``; None if it does not exist or has another form."""
    try:
        return read_splits(path)
    except (OSError, ValueError):
        return None


def _read_list(lines: Sequence[str], file: Path) -> tuple[int, dict[str, list[str]]]:
    """The number of the fold, and the cases of each part that a list or table names."""
    if file.suffix.lower() == ".csv":
        table = csv.DictReader(lines)
        columns = {name.strip().lower(): name for name in table.fieldnames or []}
        if len(columns) == 1 and ";" in next(iter(columns)):
            raise InputError(f"{file} is separated by semicolons; separate its columns by commas")
        case = next((columns[name] for name in CASE_COLUMNS if name in columns), None)
        part = next((columns[name] for name in PART_COLUMNS if name in columns), None)
        if case is not None and part is not None:
            return 0, _parts_of_table(table, case, part, file)
        if case is not None:
            lines = [row[case] or "" for row in table]
    match = LIST_NAME.search(file.stem.lower())
    if match is None or file.suffix.lower() not in (".txt", ".csv"):
        raise InputError(
            f"{file} is not a list of cases: expected train*.txt, val*.txt and test*.txt (or .csv), a .csv table with "
            "the columns case and part, or nnU-Net's splits_final.json"
        )
    names = [line.strip().strip(",") for line in lines]
    return int(match[2] or 0), {match[1]: [name for name in names if name]}


def _parts_of_table(table: Iterable[dict[str, str]], case: str, part: str, file: Path) -> dict[str, list[str]]:
    """The cases of each part; `case` and `part` are the names of the columns."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in table:
        match = re.match("train|val|test", (row[part] or "").strip().lower())
        if match is None:
            raise InputError(f"{file} puts {row[case]} into {row[part]!r}, expected train, val or test")
        found[match[0]].append((row[case] or "").strip())
    return found


def _identifier(name: str, case_names: str) -> str:
    """The name of a case, without the folders and the grade that lists write before it."""
    name = PurePosixPath(name.replace("\\", "/")).name
    short = GRADE.sub("", name)
    return short if case_names and re.fullmatch(case_names, short, re.ASCII) else name


def _by_patient(cases: Sequence[str], patient_of: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for case in sorted(cases):
        found[patient_of(case)].append(case)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
