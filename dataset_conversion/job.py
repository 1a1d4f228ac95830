"""A conversion: what it is asked for, what it reports, and how it works through the cases."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.processes import default_workers

from .cases import Case
from .checks import MAX_OUTSIDE, Checked, Headers, check_case
from .description import Description
from .progress import CaseRecord
from .splits import SEED
from .writing import COPY, REFERENCE


@dataclass(frozen=True)
class Options:
    """How to convert: the options of ``mstkd convert`` of the same names."""

    mode: str = COPY
    verify: str | None = None  # full, but header for a data set that is already finished
    allow_missing: bool = False
    strict: bool = False
    unlabelled: bool = False
    unlabelled_as_test: bool = False
    follow_links: bool = False
    max_outside: float = MAX_OUTSIDE
    test_fraction: float = 0.0
    seed: int = SEED
    folds: int | None = None  # nnU-Net's five, or one per patient if there are fewer
    val_cases: Sequence[str] = ()  # of a single fold
    split_lists: Sequence[Path] = ()  # for splits.read_lists
    protocol: str = ""  # a name of protocols.PROTOCOLS
    write_splits: bool = True  # False leaves the folds to nnU-Net
    overwrite: bool = False
    workers: int = field(default_factory=default_workers)
    progress: bool = True  # a bar, if there is a terminal

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers is {self.workers}, expected at least 1")
        if not 0 <= self.max_outside <= 1:
            raise InputError(f"--max-outside is {self.max_outside:g}, expected 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}, expected 0 to 2^32 - 1")
        lists = bool(self.split_lists), bool(self.protocol)
        ways = [self.folds is not None, bool(self.val_cases), *lists, not self.write_splits]
        if sum(ways) > 1:
            raise InputError(
                "found several of --folds, --val-cases, --splits, --protocol and --no-splits, expected one of them"
            )
        if self.unlabelled and self.unlabelled_as_test:
            raise InputError("found --unlabelled and --unlabelled-as-test, expected one of them: train on them or not")
        if self.unlabelled and not self.write_splits:
            raise InputError("found --unlabelled and --no-splits, but nnU-Net's own folds validate on unlabelled cases")
        changing = {
            "--allow-missing": self.allow_missing,
            "--unlabelled": self.unlabelled,
            "--unlabelled-as-test": self.unlabelled_as_test,
            "--test-fraction": self.test_fraction,
        }
        found = [option for option, given in changing.items() if given]
        if self.protocol and found:
            raise InputError(f"found --protocol and {found[0]}, expected one of them: a protocol fixes its cases")
        if self.split_lists and self.test_fraction:
            raise InputError("found --splits and --test-fraction, expected one of them: lists name their test cases")


@dataclass(frozen=True)
class Job:
    """One conversion: from where, to where, of what and how."""

    source: Path
    target: Path
    description: Description
    options: Options

    def __post_init__(self) -> None:
        if self.options.mode == REFERENCE and "$" in str(self.source):
            raise InputError(
                f"{self.source} has a $, which nnU-Net takes for a variable; --reference needs another path"
            )
        if self.options.mode != COPY and self.description.stack:
            raise InputError(
                f"{self.description.release} has all channels in one file, so its cases must be written: use --copy"
            )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the written files depend on, except the sources, as JSON reads it back."""
        used = ("mode", "allow_missing", "unlabelled", "unlabelled_as_test", "test_fraction", "max_outside")
        chosen = {name: getattr(self.options, name) for name in used}
        if self.options.test_fraction:
            chosen["seed"] = self.options.seed
        if self.options.protocol:
            chosen["protocol"] = self.options.protocol
        content = {"source": str(self.source), "description": asdict(self.description), **chosen}
        # as pairs, because mappings are equal whatever their order, and the order of channels and regions counts
        for key in ("modalities", "labels", "remap"):
            content["description"][key] = list(getattr(self.description, key).items())
        return json.loads(json.dumps(content))

    def check(self, case: Case, level: str, headers: Headers | None = None) -> Checked:
        """Check one case as the options say."""
        allow_missing, max_outside = self.options.allow_missing, self.options.max_outside
        return check_case(
            case, self.description, level=level, allow_missing=allow_missing, max_outside=max_outside, headers=headers
        )

    def for_each(self, cases: Sequence[Case], work: Callable[[Case], CaseRecord], title: str) -> Iterator[CaseRecord]:
        """Yield ``work(case)`` as the cases are finished; an interrupt waits only for those in work."""
        pool = ThreadPoolExecutor(self.options.workers)  # threads are enough: file I/O releases the interpreter's lock
        try:
            futures: list[Future[CaseRecord]] = [pool.submit(work, case) for case in cases]
            disable = None if self.options.progress else True
            for future in tqdm(as_completed(futures), title, len(cases), unit="case", disable=disable, leave=False):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class Report:
    """Result of a conversion."""

    folder: Path
    cases: list[CaseRecord] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # the reasons, by case
    notes: dict[str, list[str]] = field(default_factory=dict)  # the cases of a remark; none if it is general
    splits_file: Path | None = None  # if it was written or already holds these folds
    resumed: int = 0  # cases that an interrupted run had finished
    was_finished: bool = False  # whether the data set already existed, complete and as requested

    @property
    def training(self) -> list[CaseRecord]:
        """The cases to train on."""
        return [record for record in self.cases if record.part == "Tr"]

    @property
    def unlabelled(self) -> list[str]:
        """Names of the training cases without a label."""
        return [record.name for record in self.training if record.unlabelled]

    def fill(self, finished: Sequence[CaseRecord], skipped: Mapping[str, list[str]]) -> None:
        """Set the cases, in the order of their names, and collect their notes."""
        self.cases = sorted(finished, key=lambda record: record.name)
        self.skipped = dict(skipped)
        notes = defaultdict(list, self.notes)
        for record in self.cases:
            for note in record.notes:
                notes[note].append(record.name)
            if record.missing:
                notes[f"no {', no '.join(record.missing)}: zero images"].append(record.name)
            if record.unlabelled:
                notes["no label: in the training part of the folds only"].append(record.name)
        self.notes = dict(notes)


def count(things: Sized | int, noun: str) -> str:
    """A number with its noun: ``2 cases``."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}{'' if number == 1 else 's'}"


def problem_lines(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each problem of each case."""
    return [f"{case}: {line}" for case in sorted(problems) for line in problems[case]]
