"""From a description to a folder in nnUNet_raw, which appears in one step when everything in it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.dataset_conversion import splits as folds
from nnunetv2_mstkd.dataset_conversion.cases import Case, Found, find_cases
from nnunetv2_mstkd.dataset_conversion.checks import FULL, Headers, check_case
from nnunetv2_mstkd.dataset_conversion.description import Description
from nnunetv2_mstkd.dataset_conversion.finished import check_finished
from nnunetv2_mstkd.dataset_conversion.job import Options, Report, count, for_each, part_of, problem_lines
from nnunetv2_mstkd.dataset_conversion.progress import CaseRecord, Progress, file_state, fingerprint, write_record
from nnunetv2_mstkd.dataset_conversion.writing import COPY, REFERENCE, write_case
from nnunetv2_mstkd.errors import ExistingFileError, InputError
from nnunetv2_mstkd.nnunet.folders import nnunet_folder


def convert(source: Path, description: Description, dataset: str, options: Options | None = None) -> Report:
    """Write a data set in nnU-Net's raw format.

    The work is done in a hidden folder beside the data set's place. An interrupted run leaves it there, and the next
    one with the same settings goes on with it.

    Parameters
    ----------
    source
        The folder of the release. It is only read.
    description
        What it holds.
    dataset
        The name to write it under, from :func:`dataset_name`.
    options
        How.

    Raises
    ------
    FileNotFoundError
        If `source`, a list of cases or a folder of nnU-Net is absent.
    FileExistsError
        If the data set, or its split, is there and was made from something else or with other options.
    ValueError
        If nothing can be converted as asked; with ``strict`` also if anything is wrong with a case. Nothing is written.
    """
    options = options or Options()
    source = Path(os.path.abspath(source))
    if options.mode == REFERENCE and "$" in str(source):
        raise InputError(
            f"{source} has a $, at which nnU-Net would look for a variable; --reference needs another path"
        )
    if options.mode != COPY and description.stack:
        raise InputError(
            f"{description.release} has all channels in one file, so its cases must be written: use --copy"
        )
    target = nnunet_folder("nnUNet_raw") / dataset
    _refuse_second_name(dataset)
    splits_file = nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json" if options.write_splits else None
    listed, tests = folds.read_lists(options.split_lists) if options.split_lists else ([], [])
    description = replace(description, test_cases=[*description.test_cases, *tests]) if tests else description

    found = find_cases(
        source,
        description,
        allow_missing=options.allow_missing,
        unlabelled_as_test=options.unlabelled_as_test,
        follow_links=options.follow_links,
    )
    if listed:
        folds.refuse_unknown_cases(listed, tests, found.names)
    _draw_tests(found, description, options)
    if not found.cases:
        _refuse(found.problems)
    settings = _settings(source, description, options)
    make_splits = _split_maker(description, options, listed)
    # wrong options should not cost a whole conversion; cases that turn out bad are taken out later
    make_splits([case.name for case in found.cases if not case.is_test], sorted(found.problems))

    report = Report(target, notes={note: [] for note in found.notes})
    if target.exists() and not options.overwrite:
        check_finished(target, source, description, settings, found, options, report)
    else:
        _refuse_other_splits(splits_file, options)
        _convert(target, source, description, settings, found, options, report)
    training = [record.name for record in report.cases if record.part == "Tr"]
    made = make_splits(training, sorted(report.skipped))
    if splits_file is not None and made is not None:
        present = folds.read_splits(splits_file)
        if present is not None and present != made and not options.overwrite:
            raise ExistingFileError(f"{splits_file} is already there with other folds; --overwrite replaces it")
        folds.write_splits(made, splits_file)
        report.splits_file = splits_file
    elif not options.write_splits:
        _refuse_stale_splits(dataset, training)
    elif training:
        report.notes["no folds were written, because one patient leaves nobody to validate with: train fold all"] = []
    return report


def dataset_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's name of a data set, ``Dataset226_BraTS`` for 226 and ``BraTS``.

    Raises
    ------
    ValueError
        If nnU-Net could not read it back.
    """
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
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = Path(os.environ.get(variable) or "")
        if not os.environ.get(variable) or not folder.is_dir():
            continue
        number = dataset[: len("Dataset000")]
        others = [path.name for path in folder.glob(f"{number}*") if path.is_dir() and path.name != dataset]
        if others:
            raise ExistingFileError(
                f"{folder / others[0]} has the number of {dataset}, and nnU-Net finds data sets by number; "
                "take another one"
            )


def _draw_tests(found: Found, description: Description, options: Options) -> None:
    """Turn a share of the patients into test cases, the same whatever is wrong with single cases."""
    if not options.test_fraction:
        return
    cases = [name for name in found.names if not description.is_test_case(name)]
    drawn = set(folds.draw_test_cases(cases, options.test_fraction, options.seed, patient_of=description.patient_of))
    found.cases = [replace(case, is_test=case.is_test or case.name in drawn) for case in found.cases]


def _settings(source: Path, description: Description, options: Options) -> dict[str, Any]:
    """All that the written files depend on, apart from the sources, as JSON reads it back."""
    used = ("mode", "allow_missing", "unlabelled_as_test", "test_fraction", "max_outside")
    chosen = {name: getattr(options, name) for name in used}
    if options.test_fraction:
        chosen["seed"] = options.seed
    content = {"source": str(source), "description": asdict(description), **chosen}
    # pairs, because two tables are equal whatever their order, and the order of channels and regions counts
    for key in ("modalities", "labels", "remap"):
        content["description"][key] = list(getattr(description, key).items())
    return json.loads(json.dumps(content))


def _split_maker(
    description: Description, options: Options, listed: folds.Splits
) -> Callable[[Sequence[str], Sequence[str]], folds.Splits | None]:
    """Return a function of the training cases and the skipped ones that makes the folds."""

    def make(training: Sequence[str], skipped: Sequence[str]) -> folds.Splits | None:
        patient_of = description.patient_of
        if not options.write_splits:
            return None
        if listed:
            made = folds.without(listed, skipped)
            folds.refuse_shared_patients(made, patient_of)
            return made
        if options.val_cases:
            validation = [case for case in options.val_cases if case not in skipped]
            return folds.hold_out(training, validation, patient_of=patient_of)
        if options.folds is None and len({patient_of(case) for case in training}) < 2:
            return None  # nothing to hold out; nnU-Net trains with -f all
        return folds.cross_validation(training, options.folds, options.seed, patient_of=patient_of)

    return make


def _refuse_other_splits(splits_file: Path | None, options: Options) -> None:
    if splits_file is not None and splits_file.exists() and not options.overwrite:
        raise ExistingFileError(
            f"{splits_file} is already there; --overwrite replaces it, --no-splits leaves the folds to nnU-Net"
        )


def _refuse_stale_splits(dataset: str, training: Sequence[str]) -> None:
    """Folds of an earlier data set of this name would make nnU-Net look for cases that are gone."""
    folder = os.environ.get("nnUNet_preprocessed")
    file = Path(folder or "", dataset, "splits_final.json")
    present = folds.read_splits(file) if folder else None
    if present is None:
        return
    gone = sorted({case for fold in present for part in fold.values() for case in part} - set(training))
    if gone:
        raise InputError(
            f"the data set is written, but {file} names {count(gone, 'case')} that it does not have, such as "
            f"{gone[0]}; remove the file, or convert with --overwrite and without --no-splits"
        )


# ---- writing -------------------------------------------------------------------------------------------------------


def _convert(
    target: Path,
    source: Path,
    description: Description,
    settings: Mapping[str, Any],
    found: Found,
    options: Options,
    report: Report,
) -> None:
    """Check and write all cases in the hidden folder, then let it take the data set's place."""
    scratch = target.parent / f".{target.name}.unfinished"
    with locked(scratch):
        progress = Progress(scratch, settings)
        unfinished = scratch / "new"
        if not progress.done:
            shutil.rmtree(unfinished, ignore_errors=True)
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (unfinished / part).mkdir(parents=True, exist_ok=True)
        level = options.verify or FULL
        headers: Headers = {}

        def work(case: Case) -> CaseRecord:
            sources = fingerprint(case, source)
            known = progress.done.get(case.name)
            if known is not None and dict(known.sources) == sources and known.part == part_of(case):
                return known
            record = CaseRecord(case.name, part_of(case), description.patient_of(case.name), sources)
            checked = check_case(
                case,
                description,
                level=level,
                allow_missing=options.allow_missing,
                max_outside=options.max_outside,
                headers=headers,
            )
            if checked.problems:
                return replace(record, problems=checked.problems)
            written = write_case(case, checked, description, unfinished, options.mode)
            record = replace(
                record,
                images=written.images,
                label=written.label,
                missing=[name for name, gone in zip(description.modalities, checked.absent, strict=True) if gone],
                notes=checked.notes,
            )
            record = replace(record, states=[file_state(unfinished / name) for name in record.written])
            progress.add(record)
            return record

        before = dict(progress.done)
        skipped = dict(found.problems)
        finished = []
        for record in for_each(found.cases, work, options, "converting"):
            if record.problems:
                skipped[record.name] = record.problems
                continue
            report.resumed += record is before.get(record.name)
            finished.append(record)
        if not any(record.part == "Tr" for record in finished) or (options.strict and skipped):
            _refuse(skipped)
        report.fill(finished, skipped)
        _finish(unfinished, target.name, description, settings, report, options)
        _replace(target, unfinished, scratch / "old")
    shutil.rmtree(scratch, ignore_errors=True)


def _finish(
    folder: Path,
    dataset: str,
    description: Description,
    settings: Mapping[str, Any],
    report: Report,
    options: Options,
) -> None:
    """Remove what belongs to no finished case and write the two tables of contents."""
    wanted = {name for record in report.cases for name in record.written}
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        for path in list((folder / part).iterdir()):
            if f"{part}/{path.name}" not in wanted:
                path.unlink()
        if part.endswith("Ts") or options.mode == REFERENCE:
            with suppress(OSError):  # there is something in it
                (folder / part).rmdir()
    training = [record for record in report.cases if record.part == "Tr"]
    content = {"name": dataset, **description.dataset_json(len(training))}
    if options.mode == REFERENCE:
        content["dataset"] = {record.name: {"images": record.images, "label": record.label} for record in training}
    (folder / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    write_record(folder, settings, report.cases, report.skipped)


def _replace(target: Path, unfinished: Path, old: Path) -> None:
    """Let the finished folder take its place in one step; what was there is kept until then."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        unfinished.rename(target)
    except BaseException:  # an interrupt too: what was there must not be lost
        if old.exists():
            old.rename(target)
        raise


@contextmanager
def locked(scratch: Path) -> Iterator[None]:
    """Keep a second run of the same data set away, where the system has locks."""
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (scratch / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExistingFileError(f"another process is writing {scratch}; wait for it") from error
        yield
