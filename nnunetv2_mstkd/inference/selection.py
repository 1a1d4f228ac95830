"""From an input folder to the cases to work on, with all problems listed before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.checks import Checker, count_problems, format_problems
from nnunetv2_mstkd.inference.workers import in_threads
from nnunetv2_mstkd.nnunet.input_folder import Case, Problem, find_cases


@dataclass(frozen=True)
class Selection:
    """Cases to work on."""

    cases: list[Case]
    """Checked cases without problems."""
    done: int
    """Number of cases that were left out because their output exists."""
    problems: list[Problem]
    """Problems of the cases that ``skip_bad`` left out."""


def select(
    folder: Path,
    file_ending: str,
    checker: Checker,
    *,
    drop: str | None = None,
    part: slice = slice(None),
    is_done: Callable[[Case], bool] = lambda case: False,
    skip_bad: bool = False,
    threads: int = 1,
    progress: bool = False,
    verb: str,
) -> Selection:
    """Find and check the cases of a folder of ``CASE_000k`` files.

    Parameters
    ----------
    drop
        Modalities to treat as absent, for example ``T1ce,FLAIR``.
    part
        Which of the sorted cases to take; the others are neither read nor reported.
    is_done
        Tells from a case's name and files, without what is dropped, that it needs no more work; it is not read.
    skip_bad
        Leave bad cases out, if some case is good or done, instead of raising InputError with all problems.
    threads
        How many read files at a time.
    verb
        Past participle of what is going to happen, for the message.
    """
    dropped = dropped_channels(drop, checker.names)
    cases, problems = find_cases(folder, file_ending, checker.names)
    others = {case.name for case in cases} - {case.name for case in cases[part]}
    # a file of no case at all, such as one of another format, is reported with every part
    problems = [problem for problem in problems if problem.case not in others]
    cases = [case.without(dropped) for case in cases[part]]
    open_cases = [case for case in cases if not is_done(case)]
    checked = in_threads(checker.check, open_cases, threads, progress=progress)
    problems += [problem for _, found in checked for problem in found]
    bad = {problem.case for problem in problems}
    good = [case for case, _ in checked if case.name not in bad]
    done = len(cases) - len(open_cases)
    if problems and not (skip_bad and (good or done)):
        hint = f" (--skip-bad: continue with the other {len(good)})" if good else ""
        raise InputError(f"{count_problems(problems)}, nothing was {verb}{hint}:{format_problems(problems)}")
    return Selection(good, done, problems)


def dropped_channels(drop: str | None, names: Sequence[str]) -> list[int]:
    """Return the numbers of the channels that ``drop`` names; InputError if these are all."""
    if drop is None:
        return []
    channels = modalities.parse_subset(drop, names).nonzero().ravel().tolist()
    if len(channels) == len(names):
        raise InputError(f"--drop {drop} leaves no modality")
    return channels
