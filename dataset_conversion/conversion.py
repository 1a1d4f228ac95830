"""Write a data set in nnU-Net's raw format; it appears in one step, when it is complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunetv2_mstkd.errors import ExistingFileError, InputError
from nnunetv2_mstkd.images.atomic import locked, replace_folder
from nnunetv2_mstkd.nnunet.folders import nnunet_folder

from . import splits as folds
from .cases import Case, Found, find_cases
from .checks import FULL, Headers
from .description import Description
from .finished import check_finished, refuse_foreign
from .job import Job, Options, Report, count, problem_lines
from .progress import CaseRecord, Progress, file_state, fingerprint, write_record
from .protocols import PROTOCOLS, protocol_list
from .writing import REFERENCE, write_case

PARTS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")


def convert(source: Path, description: Description, dataset: str, options: Options | None = None) -> Report:
    """Write a data set in nnU-Net's raw format.

    The work is done in a hidden folder beside the data set's place. An interrupted run leaves it there, and the next
    one with the same settings continues with it.

    Parameters
    ----------
    source
        The folder of the release. It is only read.
    description
        What it holds.
    dataset
        Name of the new data set, from :func:`dataset_name`.
    options
        How to convert.

    Raises
    ------
    MissingFileError
        If `source`, a list of cases or a folder of nnU-Net does not exist.
    ExistingFileError
        If the data set, or its split, exists and was made from something else or with other options.
    InputError
        If nothing can be converted as requested; with ``strict`` also if any case has a problem, and with a protocol if
        any of its cases is missing or has a problem. Nothing is written.
    """
    options = options or Options()
    target = nnunet_folder("nnUNet_raw") / dataset
    _refuse_second_name(dataset)
    splits_file = nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json" if options.write_splits else None
    lists = [protocol_list(options.protocol, description.release)] if options.protocol else options.split_lists
    if options.protocol and description.test_cases:
        raise InputError("found --protocol and --test-cases, expected one of them: a protocol fixes its cases")
    listed, tests = folds.read_lists(lists, description.case_names) if lists else ([], [])
    own = description
    if tests:
        description = replace(description, test_cases=[*description.test_cases, *tests])
    if options.unlabelled:
        description = description.with_ignore()
    searched = own if options.protocol else description  # the test cases of a protocol need labels too
    job = Job(Path(os.path.abspath(source)), target, description, options)

    found = find_cases(
        job.source, searched, allow_missing=options.allow_missing, unlabelled=options.unlabelled,
        unlabelled_as_test=options.unlabelled_as_test, follow_links=options.follow_links,
    )  # fmt: skip
    if listed:
        folds.refuse_unknown_cases(listed, tests, found.names, options.protocol)
    if options.protocol:
        _keep_protocol(found, options.protocol, listed, tests)
    _draw_tests(found, job)
    _refuse_shared_tests(found, job, listed)
    if not any(case.label and not case.is_test for case in found.cases):
        _refuse(found.problems)
    if target.exists() and options.overwrite:
        refuse_foreign(target)
    # wrong options should not cost a whole conversion; cases that turn out bad are taken out later
    _check_splits(job, listed, found)

    report = Report(target, notes={note: [] for note in found.notes})
    if target.exists() and not options.overwrite:
        check_finished(job, found, report)
        made = _make_splits(job, listed, report.cases, report.skipped)
    else:
        if splits_file is not None and splits_file.exists() and not options.overwrite:
            raise ExistingFileError(
                f"{splits_file} already exists; --overwrite replaces it, --no-splits leaves the folds to nnU-Net"
            )
        made = _convert(job, found, report, listed)
    training = [record.name for record in report.training]
    if splits_file is not None and made is not None:
        present = folds.present_splits(splits_file)
        if present is not None and present != made and not options.overwrite:
            raise ExistingFileError(f"{splits_file} already exists with other folds; --overwrite replaces it")
        folds.write_splits(made, splits_file)
        report.splits_file = splits_file
    elif not options.write_splits:
        _refuse_stale_splits(dataset, training)
    elif training:
        report.notes["no folds were written, because a single patient cannot be split: train fold all"] = []
    return report


def dataset_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's name of a data set, ``Dataset226_BraTS`` for 226 and ``BraTS``, which it must read back."""
    if not 1 <= dataset_id <= 999:
        raise InputError(f"the data set's number is {dataset_id}, expected 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name:
        raise InputError(
            f"the data set's name is {name!r}, expected letters, digits, '.', '_' and '-', without a double "
            "underscore, at which nnU-Net splits the names of its results"
        )
    return f"Dataset{dataset_id:03d}_{name}"


# ---- before anything is written ------------------------------------------------------------------------------------


def _refuse(problems: Mapping[str, Sequence[str]]) -> None:
    lines = problem_lines(problems)
    raise InputError(f"{count(lines, 'problem')}, nothing was written:\n  " + "\n  ".join(lines))


def _refuse_second_name(dataset: str) -> None:
    """Refuse a number that another data set has: nnU-Net finds data sets by number."""
    number = dataset[: len("Dataset000")]
    for folder in filter(None, map(os.environ.get, ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"))):
        others = [path for path in Path(folder).glob(f"{number}*") if path.is_dir() and path.name != dataset]
        if others:
            raise ExistingFileError(
                f"{others[0]} has the number of {dataset}, and nnU-Net finds data sets by number; choose another one"
            )


def _keep_protocol(found: Found, protocol: str, listed: folds.Splits, tests: Sequence[str]) -> None:
    """Refuse problems of the cases of a protocol, leave out all others, and set its test cases."""
    named, test_cases = folds.listed_cases(listed, tests), set(tests)
    others = [name for name in found.names if name not in named]
    found.cases = [replace(case, is_test=case.name in test_cases) for case in found.cases if case.name in named]
    found.problems = {name: lines for name, lines in found.problems.items() if name in named}
    if found.problems:
        _refuse(found.problems)
    train, validation = len(listed[0]["train"]), len(listed[0]["val"])
    found.notes.append(f"{protocol}: {train} cases to train on, {validation} to validate on, {len(tests)} to test on")
    if others:
        found.notes.append(f"{count(others, 'case')} that {protocol} does not name left out, such as {others[0]}")
    if PROTOCOLS[protocol].note:
        found.notes.append(PROTOCOLS[protocol].note)


def _draw_tests(found: Found, job: Job) -> None:
    """Make the cases of a share of the patients test cases; which ones does not depend on problems of single cases."""
    options, description = job.options, job.description
    if not options.test_fraction:
        return
    patient_of, unlabelled = description.patient_of, {case.name for case in found.cases if case.unlabelled}
    cases = [name for name in found.names if not description.is_test_case(name) and name not in unlabelled]
    drawn = folds.draw_test_cases(cases, options.test_fraction, options.seed, patient_of=patient_of)
    patients = {patient_of(case) for case in drawn}
    found.cases = [replace(case, is_test=case.is_test or patient_of(case.name) in patients) for case in found.cases]


def _refuse_shared_tests(found: Found, job: Job, listed: folds.Splits) -> None:
    """Refuse test cases of a patient who also trains or validates; without a label by themselves, they are noted.

    Cases that train without a label, or that no list names, are in no fold with such a test case.
    """
    patient_of, named = job.description.patient_of, folds.listed_cases(listed, ())
    used = [case.name for case in found.cases if not (case.is_test or case.unlabelled)]
    by_patient = {patient_of(name): name for name in reversed(used) if not named or name in named}
    shared = [case.name for case in found.cases if case.is_test and patient_of(case.name) in by_patient]
    for case in shared:
        patient = patient_of(case)
        if job.description.is_test_case(case):
            raise InputError(
                f"patient {patient} is in training and test: {by_patient[patient]} trains or validates, {case} tests; "
                "put all cases of a patient on one side"
            )
    if shared:
        found.notes.append(f"{count(shared, 'unlabelled test case')} of patients who also train, such as {shared[0]}")


def _make_splits(
    job: Job, listed: folds.Splits, cases: Sequence[Case] | Sequence[CaseRecord], skipped: Mapping[str, Sequence[str]]
) -> folds.Splits | None:
    """The folds of the training cases; None if nnU-Net makes them or a single patient cannot be split.

    InputError, with the problems of ``skipped`` cases, if they cannot be made without these.
    """
    try:
        return _splits_without(job, listed, cases, skipped)
    except InputError as error:
        raise InputError("\n  ".join([str(error), *problem_lines(skipped)])) from error


def _splits_without(
    job: Job, listed: folds.Splits, cases: Sequence[Case] | Sequence[CaseRecord], skipped: Collection[str]
) -> folds.Splits | None:
    """As :func:`_make_splits`, whose InputError does not tell the problems."""
    options, patient_of = job.options, job.description.patient_of
    if not options.write_splits:
        return None
    tests = [case.name for case in cases if case.part == "Ts"]
    unlabelled = [case.name for case in cases if case.unlabelled]
    labelled = [case.name for case in cases if case.part == "Tr" and not case.unlabelled]
    if listed:
        made = folds.without(listed, skipped)
        folds.refuse_shared_patients(made, patient_of)
    elif options.val_cases:
        folds.refuse_unlabelled(options.val_cases, unlabelled)
        validation = [case for case in options.val_cases if case not in skipped]
        made = folds.hold_out(labelled, validation, patient_of=patient_of)
    elif options.folds is None and len({patient_of(case) for case in labelled}) < 2:
        return None
    else:
        made = folds.cross_validation(labelled, options.folds, options.seed, patient_of=patient_of)
    return folds.with_unlabelled(made, unlabelled, tests, patient_of=patient_of)


def _check_splits(job: Job, listed: folds.Splits, found: Found) -> None:
    """Refuse folds that cannot be made even if no further case turns out bad, and note cases that no list names."""
    made = _make_splits(job, listed, found.cases, found.problems)
    named = folds.listed_cases(made or [], ())
    unnamed = [case.name for case in found.cases if listed and case.part == "Tr" and case.name not in named]
    if unnamed:
        found.notes.append(f"{count(unnamed, 'training case')} in no fold, such as {unnamed[0]}")


def _refuse_stale_splits(dataset: str, training: Sequence[str]) -> None:
    """Folds of an earlier data set of this name would make nnU-Net look for cases that are gone."""
    folder = os.environ.get("nnUNet_preprocessed")
    file = Path(folder or "", dataset, "splits_final.json")
    present = folds.present_splits(file) if folder else None
    gone = sorted({case for fold in present or [] for part in fold.values() for case in part} - set(training))
    if gone:
        raise InputError(
            f"the data set is written, but {file} names {count(gone, 'case')} that it does not have, such as "
            f"{gone[0]}; remove the file, or convert with --overwrite and without --no-splits"
        )


# ---- writing -------------------------------------------------------------------------------------------------------


def _convert(job: Job, found: Found, report: Report, listed: folds.Splits) -> folds.Splits | None:
    """Check and write all cases in the hidden folder, then move it to the data set's place; return the folds."""
    scratch = job.target.parent / f".{job.target.name}.unfinished"
    with locked(scratch, f"another process is writing {scratch}; wait for it"):
        progress = Progress(scratch, job.settings)
        resumable = dict(progress.done)
        unfinished = scratch / "new"
        if not resumable:
            shutil.rmtree(unfinished, ignore_errors=True)
        for part in PARTS:
            (unfinished / part).mkdir(parents=True, exist_ok=True)
        headers: Headers = {}
        skipped = dict(found.problems)
        finished = []
        work = partial(_one, job, unfinished, progress, headers)
        for record in job.for_each(found.cases, work, "converting"):
            if record.problems:
                skipped[record.name] = record.problems
                continue
            report.resumed += record is resumable.get(record.name)
            finished.append(record)
        labelled = any(record.part == "Tr" and not record.unlabelled for record in finished)
        if skipped and (not labelled or job.options.strict or job.options.protocol):
            _refuse(skipped)
        if not labelled:
            raise InputError(f"all {count(finished, 'case')} are unlabelled: there is nothing to train on")
        report.fill(finished, skipped)
        # before the data set appears: without these folds nnU-Net would make its own
        made = _make_splits(job, listed, report.cases, skipped)
        _finish(unfinished, job, report)
        replace_folder(job.target, unfinished)
    shutil.rmtree(scratch, ignore_errors=True)
    return made


def _one(job: Job, folder: Path, progress: Progress, headers: Headers, case: Case) -> CaseRecord:
    """Check and write one case, unless an interrupted run has finished it."""
    description = job.description
    sources = fingerprint(case, job.source)
    known, level = progress.done.get(case.name), job.options.verify or FULL
    # a crash of the machine may lose what was written last
    if known is not None and known.level in (FULL, level) and known.is_of(case, sources) and not known.damage(folder):
        return known
    record = CaseRecord(case.name, case.part, description.patient_of(case.name), sources, level=level)
    checked = job.check(case, level, headers)
    if checked.problems:
        return replace(record, problems=checked.problems)
    written = write_case(case, checked, description, folder, job.options.mode)
    missing = [name for name, absent in zip(description.modalities, checked.absent, strict=True) if absent]
    record = replace(record, images=written.images, label=written.label, missing=missing, notes=checked.notes)
    states = [file_state(folder / name) for name in record.written]
    record = replace(record, states=states, unlabelled=checked.unlabelled)
    progress.add(record)
    return record


def _finish(folder: Path, job: Job, report: Report) -> None:
    """Remove what belongs to no finished case; write ``dataset.json`` and the record of the conversion."""
    reference = job.options.mode == REFERENCE
    wanted = {name for record in report.cases for name in record.written}
    for part in PARTS:
        for path in list((folder / part).iterdir()):
            if f"{part}/{path.name}" not in wanted:
                path.unlink()
        if part.endswith("Ts") or reference:
            with suppress(OSError):  # not empty
                (folder / part).rmdir()
    missing = {case.name: case.missing for case in report.training if case.missing}
    described = job.description.dataset_json(len(report.training), missing, report.unlabelled)
    content = {"name": job.target.name, **described}
    if reference:
        content["dataset"] = {case.name: {"images": case.images, "label": case.label} for case in report.training}
    (folder / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    write_record(folder, job.settings, report.cases, report.skipped)
