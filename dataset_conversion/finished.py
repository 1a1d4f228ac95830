"""Compare a data set that already exists with what a conversion would write, and verify its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nnunetv2_mstkd.errors import ExistingFileError

from .cases import Case, Found
from .checks import FULL, HEADER, check_case
from .job import Job, Report, count, problem_lines
from .progress import CaseRecord, fingerprint, read_record

_FOREIGN = " and was not written by mstkd convert; choose another number with -d, or remove it yourself"


def refuse_foreign(target: Path) -> None:
    """Refuse to replace what no conversion has written: a data set made by other means, and files put into one."""
    if not any(target.iterdir()):
        return
    known = read_record(target)
    if known is None:
        raise ExistingFileError(f"{target} exists{_FOREIGN}")
    written = {name for record in known[1].values() for name in record.written}
    files = [path for kind in ("images", "labels") for path in target.glob(f"{kind}T[rs]/[!.]*")]
    added = sorted({path.relative_to(target).as_posix() for path in files} - written)
    if added:
        raise ExistingFileError(
            f"{target} has {count(added, 'file')} that mstkd convert has not written, such as {added[0]}; --overwrite "
            f"would remove them, so move them elsewhere first"
        )


def check_finished(job: Job, found: Found, report: Report) -> None:
    """Verify an existing data set and fill the report with its cases.

    ExistingFileError if it was made by something else, with other settings or from other files, or has changed since.
    """
    target = job.target
    known = read_record(target)
    if known is None:
        raise ExistingFileError(f"{target} already exists{_FOREIGN}")
    settings, records, skipped = known
    changed = next((name for name in job.settings if settings.get(name) != job.settings[name]), None)
    if changed is not None:
        before, now = settings.get(changed), job.settings[changed]
        values = f" (found {before}, requested {now})" if isinstance(now, (str, int, float)) else ""
        raise ExistingFileError(f"{target} already exists with another {changed}{values}; --overwrite replaces it")
    names = set(found.names)
    gone, new = sorted(set(records) - names), sorted(names - set(records) - set(skipped))
    if gone or new:
        raise ExistingFileError(
            f"{target} already exists with other cases ({len(new)} new, {len(gone)} gone, such as "
            f"{(new + gone)[0]}); --overwrite replaces it"
        )

    def work(case: Case) -> CaseRecord:
        record = records[case.name]
        if not record.is_of(case, fingerprint(case, job.source)):
            return replace(record, problems=["its files have changed since it was converted"])
        return replace(record, problems=_verify_written(job, record))

    by_name = {case.name: case for case in found.cases}
    finished = list(job.for_each([by_name[name] for name in records if name in by_name], work, "verifying"))
    bad = {name: lines for name, lines in found.problems.items() if name in records}
    bad |= {record.name: record.problems for record in finished if record.problems}
    for name in sorted(set(skipped) & set(by_name)):
        if not job.check(by_name[name], FULL).problems:
            bad[name] = ["it was left out, but has no problems now"]
    if bad:
        lines = "\n  ".join(problem_lines(bad))
        raise ExistingFileError(f"{target} is damaged or out of date; --overwrite converts it again:\n  {lines}")
    report.was_finished = True
    report.fill(finished, skipped)


def _verify_written(job: Job, record: CaseRecord) -> list[str]:
    """Check the files of one case in a finished data set."""
    level = job.options.verify or HEADER
    damage = record.damage(job.target)
    if damage is not None:
        return [damage]
    if level == HEADER:
        return []
    paths = [job.target / name for name in record.written]
    images = tuple(
        None if modality in record.missing else path
        for modality, path in zip(job.description.modalities, paths, strict=False)
    )
    case = Case(record.name, images, paths[-1] if record.label else None, record.part == "Ts")
    written = replace(job.description, stack=(), slices=None, remap={}, ignore_added=False)
    return check_case(case, written, level=level, allow_missing=True, max_outside=job.options.max_outside).problems
