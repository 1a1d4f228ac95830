"""The steps of the demo: commands that a user would type, run by :func:`nnunetv2_mstkd.crossval.local.run_steps`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnunetv2_mstkd.crossval.local import run_steps
from nnunetv2_mstkd.crossval.steps import Progress, Step, Train
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.registration import EXTERNAL_TRAINERS, TRAINER_PATH
from nnunetv2_mstkd.processes import usable_cores

BAR = "{desc:<32}{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
START = 12.0
"""Seconds until a command begins with its work."""
FOLDERS = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}


def environment(folder: Path) -> dict[str, str]:
    """Variables of nnU-Net's commands: their folders inside `folder`, our trainers, and sleeping threads."""
    return {
        **{name: str(folder / sub) for name, sub in FOLDERS.items()},
        EXTERNAL_TRAINERS: TRAINER_PATH,
        # threads that sleep instead of spinning while they wait: on a machine in use this is several times faster
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


@dataclass(frozen=True)
class DemoStep(Step):
    """A step whose files are all in the demo's folder, and which uses `threads` threads or processes.

    `seconds` is the estimate of how long it takes on two CPU cores.
    """

    name: str = ""
    threads: int = 1
    seconds: float = 0.0

    @property
    def key(self) -> str:
        return self.name.replace(" ", "_")

    @property
    def title(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        """The demo's folder."""
        return self.model.results.parents[1]

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.key}.log"

    def variables(self) -> dict[str, str]:
        return {**environment(self.folder), "nnUNet_def_n_proc": str(self.threads), "nnUNet_n_proc_DA": "1"}


@dataclass(frozen=True)
class Command(DemoStep):
    """A command, made when the step begins, that is done when as many files exist as `total`."""

    words: Callable[[], list[str]] = list
    total: int = 1
    count: Callable[[], int] = int

    def done(self) -> bool:
        return self.count() >= self.total

    def progress(self) -> Progress:
        return Progress("file", self.count(), self.total)

    def command(self) -> list[str]:
        return self.words()


@dataclass(frozen=True)
class TrainModel(DemoStep, Train):
    """Train a model of the demo; on a CPU its data are loaded in the process itself."""

    def variables(self) -> dict[str, str]:
        loaders = 0 if self.model.device == "cpu" else min(12, usable_cores())
        return super().variables() | {"nnUNet_n_proc_DA": str(loaders)}


@dataclass
class Clock:
    """Time that is left, from the steps' estimates and the pace: the measured time of trainings over the estimate."""

    pace: float = 1.0

    def measure(self, step: DemoStep, seconds: float, share: float) -> None:
        """Note that a step has done a share of its work (0 to 1) in so many seconds."""
        if isinstance(step, TrainModel) and share > 0:
            self.pace = seconds / (START + share * (step.seconds - START))

    def minutes_left(self, step: DemoStep, share: float, later: float) -> float:
        """Minutes until a step and those after it, `later` estimated seconds, are done."""
        return self.pace * ((1 - share) * step.seconds + later) / 60


def run_with_bar(step: DemoStep, clock: Clock, later: float = 0.0) -> None:
    """Run a step with a progress bar; an error names the last line of its log.

    Parameters
    ----------
    step, clock
        The step, and what is known of the pace of this machine.
    later
        Estimated seconds of the steps after this one.
    """
    start = time.monotonic()
    first = step.progress() or Progress("", 0)
    before = first.done or 0
    with tqdm(total=first.total, initial=before, desc=step.title, bar_format=BAR, file=sys.stderr) as bar:

        def watch(_: Step) -> None:
            progress = step.progress()
            if progress is not None and progress.done is not None and progress.done > bar.n:
                bar.total = progress.total
                if bar.total:
                    clock.measure(step, time.monotonic() - start, (progress.done - before) / bar.total)
                    left = clock.minutes_left(step, progress.done / bar.total, later)
                    bar.set_postfix_str(f"about {math.ceil(left)} min left in all", refresh=False)
                bar.update(progress.done - bar.n)

        outcome = run_steps([step], report=lambda line: None, watch=watch)
        if outcome.failed:
            raise InputError(f"{step.title} failed: {outcome.failed[step.key]}")
        bar.update((bar.total or bar.n) - bar.n)
