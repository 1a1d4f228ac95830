"""What a conversion is asked for, what it reports, and how it goes through the cases."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nnunetv2_mstkd.dataset_conversion import splits as folds
from nnunetv2_mstkd.dataset_conversion.cases import Case
from nnunetv2_mstkd.dataset_conversion.checks import MAX_OUTSIDE
from nnunetv2_mstkd.dataset_conversion.progress import CaseRecord
from nnunetv2_mstkd.dataset_conversion.writing import COPY
from nnunetv2_mstkd.errors import InputError

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes
    ----------
    mode
        ``"copy"``, ``"link"`` or ``"reference"``.
    verify
        ``"full"`` or ``"header"``; None: full, but header for a data set that is already finished.
    allow_missing
        Keep cases without some modalities, as zero images.
    strict
        Write nothing if any case has a problem, in place of leaving that case out.
    unlabelled_as_test
        Take cases without a label as test cases.
    follow_links
        Accept files outside the source to which links lead.
    max_outside
        Share of a label's voxels that may lie where every image is zero.
    test_fraction
        Share of the patients to draw as test cases; 0 for none.
    seed
        Of test cases and folds.
    folds
        Their number; None for nnU-Net's five, or one per patient where there are fewer.
    val_cases
        One fold that validates on these.
    split_lists
        Files of published splits, for :func:`nnunetv2_mstkd.dataset_conversion.splits.read_lists`.
    write_splits
        False leaves the folds to nnU-Net.
    overwrite
        Replace what is there.
    workers
        Cases at a time.
    progress
        Show a bar where there is a terminal to see it.
    """

    mode: str = COPY
    verify: str | None = None
    allow_missing: bool = False
    strict: bool = False
    unlabelled_as_test: bool = False
    follow_links: bool = False
    max_outside: float = MAX_OUTSIDE
    test_fraction: float = 0.0
    seed: int = folds.SEED
    folds: int | None = None
    val_cases: Sequence[str] = ()
    split_lists: Sequence[Path] = ()
    write_splits: bool = True
    overwrite: bool = False
    workers: int = DEFAULT_WORKERS
    progress: bool = True

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers is {self.workers}, expected at least 1")
        if not 0 <= self.max_outside <= 1:
            raise InputError(f"--max-outside is {self.max_outside:g}, expected 0 to 1")
        ways = [self.folds is not None, bool(self.val_cases), bool(self.split_lists), not self.write_splits]
        if sum(ways) > 1:
            raise InputError("found several of --folds, --val-cases, --splits and --no-splits, expected one of them")
        if self.split_lists and self.test_fraction:
            raise InputError("found --splits and --test-fraction, expected one of them: lists name their test cases")


@dataclass
class Report:
    """What came of a conversion.

    Attributes
    ----------
    folder
        The data set.
    cases
        All cases in it.
    skipped
        Cases left out -> why.
    notes
        Line -> cases that it is true of; none for lines about all.
    splits_file
        ``splits_final.json``, if it was written or is as asked for.
    resumed
        How many cases an interrupted run had finished.
    was_finished
        Whether the data set was there and everything in it is as asked for.
    """

    folder: Path
    cases: list[CaseRecord] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    splits_file: Path | None = None
    resumed: int = 0
    was_finished: bool = False

    def fill(self, finished: Sequence[CaseRecord], skipped: Mapping[str, list[str]]) -> None:
        """Take over the cases, by name, and collect their notes."""
        self.cases = sorted(finished, key=lambda record: record.name)
        self.skipped = dict(skipped)
        notes = defaultdict(list, self.notes)
        for record in self.cases:
            for note in record.notes:
                notes[note].append(record.name)
            if record.missing:
                notes[f"no {', no '.join(record.missing)}: zero images"].append(record.name)
        self.notes = dict(notes)


def part_of(case: Case) -> str:
    """``Tr`` or ``Ts``, as in the names of nnU-Net's folders."""
    return "Ts" if case.is_test else "Tr"


def for_each(
    cases: Sequence[Case], work: Callable[[Case], CaseRecord], options: Options, what: str
) -> Iterator[CaseRecord]:
    """Yield ``work(case)`` as the cases get done; an interrupt waits for those at work only."""
    pool = ThreadPoolExecutor(options.workers)  # threads do: reading and writing release the interpreter's lock
    try:
        futures: list[Future[CaseRecord]] = [pool.submit(work, case) for case in cases]
        disable = None if options.progress else True
        for future in tqdm(as_completed(futures), what, len(cases), unit="case", disable=disable, leave=False):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def count(things: Sized, noun: str) -> str:
    """``2 cases``."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def problem_lines(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each problem of each case."""
    return [f"{case}: {line}" for case in sorted(problems) for line in problems[case]]
