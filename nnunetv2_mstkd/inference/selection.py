"""From an input folder to the cases to work on, with all problems listed before anything starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.checks import Checker, listed, split_good
from nnunetv2_mstkd.inference.input_folder import Case, Problem, find_cases


@dataclass(frozen=True)
class Selection:
    """Cases to work on.

    Attributes
    ----------
    cases:
        checked and without problems.
    done:
        number of cases that were left out because their output is there.
    problems:
        of the cases that ``skip_bad`` left out.
    """

    cases: list[Case]
    done: int
    problems: list[Problem]

    def report(self) -> int:
        """Print what was left out on stderr; exit code 1 if anything was, else 0."""
        if not self.problems:
            return 0
        print(f"{_count(self.problems)}, left out:{listed(self.problems)}", file=sys.stderr)
        return 1


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
    """Find and check the cases of an input folder.

    Parameters
    ----------
    folder, file_ending:
        of the input.
    checker:
        what is checked.
    drop:
        modalities to treat as absent, for example ``T1ce,FLAIR``.
    part:
        of the sorted cases; the others are neither read nor reported.
    is_done:
        tells by its name and files that a case, without what is dropped, needs no more work; it is not read.
    skip_bad:
        leave bad cases out instead of refusing all.
    threads, progress:
        for reading.
    verb:
        past participle of what is going to happen, for the message.

    Raises
    ------
    FileNotFoundError
        if there is no input.
    ValueError
        with all problems of all cases, unless ``skip_bad`` and some case is good or done.
    """
    names = checker.names
    dropped: Sequence[int] = ()
    if drop is not None:
        dropped = [channel for channel, chosen in enumerate(modalities.parse_subset(drop, names).tolist()) if chosen]
        if len(dropped) == len(names):
            raise InputError(f"--drop {drop} leaves no modality")
    cases, problems = find_cases(folder, file_ending, names)
    others = {case.name for case in cases}
    cases = cases[part]
    others -= {case.name for case in cases}
    # a file that belongs to no case at all, such as one of another format, is nobody else's to report
    problems = [problem for problem in problems if problem.case not in others]
    cases = [case.without(dropped) for case in cases]
    open_cases = [case for case in cases if not is_done(case)]
    checked, found = checker.check_all(open_cases, threads=threads, progress=progress)
    problems += found
    good = split_good(checked, problems)
    done = len(cases) - len(open_cases)
    if problems and not (skip_bad and (good or done)):
        hint = f" (--skip-bad: go on with the other {len(good)})" if good else ""
        raise InputError(f"{_count(problems)}, nothing was {verb}{hint}:{listed(problems)}")
    return Selection(good, done, problems)


def _count(problems: Sequence[Problem]) -> str:
    number = len(problems)
    bad = len({problem.case for problem in problems if problem.case is not None})
    return f"{number} problem{'s' * (number != 1)} in {bad} case{'s' * (bad != 1)}"
