"""A data set that is already there: whether it is what this run would write, and whether its files are as written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.dataset_conversion.cases import Case, Found
from nnunetv2_mstkd.dataset_conversion.checks import HEADER, check_case
from nnunetv2_mstkd.dataset_conversion.description import Description
from nnunetv2_mstkd.dataset_conversion.job import Options, Report, for_each, part_of, problem_lines
from nnunetv2_mstkd.dataset_conversion.progress import CaseRecord, file_state, fingerprint, read_record
from nnunetv2_mstkd.errors import ExistingFileError


def check_finished(
    target: Path,
    source: Path,
    description: Description,
    settings: Mapping[str, Any],
    found: Found,
    options: Options,
    report: Report,
) -> None:
    """Compare a finished data set with what this run would write, and verify its files."""
    known = read_record(target)
    if known is None:
        raise ExistingFileError(f"{target} is already there; --overwrite replaces it")
    was, records, skipped = known
    changed = [name for name in settings if was.get(name) != settings[name]]
    if changed:
        before, now = was.get(changed[0]), settings[changed[0]]
        values = f" ({before} there, {now} asked for)" if isinstance(now, (str, int, float)) else ""
        raise ExistingFileError(f"{target} is already there with another {changed[0]}{values}; --overwrite replaces it")
    names = {case.name for case in found.cases} | set(found.problems)
    gone, new = sorted(set(records) - names), sorted(names - set(records) - set(skipped))
    if gone or new:
        raise ExistingFileError(
            f"{target} is already there with other cases ({len(new)} new, {len(gone)} gone, such as "
            f"{(new + gone)[0]}); --overwrite replaces it"
        )
    by_name = {case.name: case for case in found.cases}
    level = options.verify or HEADER

    def work(case: Case) -> CaseRecord:
        record = records[case.name]
        if dict(record.sources) != fingerprint(case, source) or record.part != part_of(case):
            return replace(record, problems=["its files have changed since it was converted"])
        return replace(record, problems=_verify_written(target, record, description, level, options))

    cases = [by_name[name] for name in records if name in by_name]
    bad = {name: lines for name, lines in found.problems.items() if name in records}
    finished = []
    for record in for_each(cases, work, options, "verifying"):
        if record.problems:
            bad[record.name] = record.problems
        else:
            finished.append(record)
    for name in sorted(set(skipped) & set(by_name)):
        check = check_case(
            by_name[name], description, allow_missing=options.allow_missing, max_outside=options.max_outside
        )
        if not check.problems:
            bad[name] = ["it was left out, but is good now"]
    if bad:
        lines = problem_lines(bad)
        raise ExistingFileError(
            f"{target} is not as it should be; --overwrite makes it again:\n  " + "\n  ".join(lines)
        )
    report.was_finished = True
    report.fill(finished, skipped)


def _verify_written(
    target: Path, record: CaseRecord, description: Description, level: str, options: Options
) -> list[str]:
    """Check the files of one case in a finished data set."""
    paths = [target / name for name in record.written]  # an absolute path stays as it is
    lost = [path for path in paths if not path.is_file()]
    if lost:
        return [f"{lost[0]} is gone"]
    other = [path for path, state in zip(paths, record.states, strict=True) if file_state(path) != state]
    if other:
        return [f"{other[0]} is not as it was written: its size, beginning or end has changed"]
    if level == HEADER:
        return []
    images = tuple(
        None if modality in record.missing else path
        for modality, path in zip(description.modalities, paths, strict=False)
    )
    case = Case(record.name, images, paths[-1] if record.label else None, record.part == "Ts")
    written = replace(description, stack=(), remap={})
    checked = check_case(case, written, level=level, allow_missing=True, max_outside=options.max_outside)
    return checked.problems
